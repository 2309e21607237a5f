"""Pages of steering, vectors, commits and autoencoders in headless Chromium: both widths, both themes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.report import made_factory, sae_factory
from tests.unit.report.test_training import TRAINING
from trimtab.report import report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

HOSTILE = "</script><img src=x onerror=alert(1)><b>bold</b>"
MADE = {
    "evaluation": made_factory.steering,
    "commits": made_factory.walk,
    "vectors": made_factory.vectors,
    "extraction": made_factory.extraction,
    "cleaning": made_factory.cleaning,
    "sae_run": made_factory.sae_run,
    "sae": sae_factory.evaluation,
}
PLAIN = {"training": lambda: TRAINING, "sae_bare": sae_factory.bare, "precision": sae_factory.precision}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    results = {name: make() for name, make in {**MADE, **PLAIN}.items()}
    results |= {f"{name} hostile": make(HOSTILE) for name, make in MADE.items()}
    return {name: Path(report(result, folder / f"{name}.html")) for name, result in results.items()}


class Visit:
    """One page with a record of what went wrong on it."""

    def __init__(self, browser: Browser, file: Path, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def outside(page: Page, width: int) -> list[str]:
    """What reaches past the right edge of the window, scrolled boxes left out."""
    found: list[str] = page.evaluate(
        """width => [...document.querySelectorAll("main *")]
            .filter((e) => !e.closest(".scroll, .svg, .hidden, pre"))
            .filter((e) => e.getBoundingClientRect().right > width + 1)
            .map((e) => e.tagName + "." + e.getAttribute("class"))""",
        width,
    )
    return found


@pytest.mark.parametrize("name", [*MADE, *PLAIN, *(f"{name} hostile" for name in MADE)])
def test_page_loads_alone_and_fits(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with Visit(browser, pages[name]) as visit:
        page = visit.page
        assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
        assert page.locator("img, main b, main script").count() == 0
        anchors = page.eval_on_selector_all("nav a", "all => all.map((a) => a.getAttribute('href').slice(1))")
        assert [one for one in anchors if page.locator(f"#{one}").count() != 1] == []
        unnamed = page.eval_on_selector_all(
            "main svg", "all => all.filter((e) => !e.getAttribute('aria-label')).length"
        )
        assert unnamed == 0, "every drawing says what it is"
        for width, theme in ((1280, "light"), (400, "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert outside(page, width) == []
            assert page.locator("h1").is_visible()
            light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number)[0]")
            assert (light > 128) == (theme == "light")
        assert visit.messages == []


def inside(page: Page, drawing: str, marks: str) -> None:
    """Assert that marks of a drawing lie within it, and that there are some."""
    boxes = page.eval_on_selector_all(
        drawing,
        """(all, marks) => all.map((svg) => {
            const own = svg.getBoundingClientRect();
            return [...svg.querySelectorAll(marks)].map((e) => e.getBoundingClientRect()).filter((box) =>
                box.left < own.left - 1 || box.right > own.right + 1 || box.top < own.top - 1
                || box.bottom > own.bottom + 1).length;
        })""",
        marks,
    )
    assert boxes and not any(boxes), f"{marks} outside of {drawing}: {boxes}"
    assert page.locator(f"{drawing} {marks}").count() > 0


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_of_autoencoders_draws_every_figure(browser: Browser, pages: dict[str, Path], width: int) -> None:
    with Visit(browser, pages["sae"], width) as visit:
        page = visit.page
        assert page.locator("h1").inner_text().startswith("At L0 20.8")
        assert page.locator("#curves svg").count() == 4
        assert page.locator("#curves svg").first.locator("circle").count() == 4
        assert page.locator("#curves svg").first.locator(".line").count() == 2
        for marks in ("circle", ".whisker", "text"):
            inside(page, "#curves svg", marks)
        assert page.locator("#densities svg").count() == 8
        inside(page, "#densities svg", "rect")
        inside(page, "#densities svg", "text")
        assert page.locator("#precision svg rect").count() == 3
        assert page.locator("#record table").first.locator("tbody tr").count() == 4


def test_examples_are_shaded_by_their_activation(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["sae"]) as visit:
        page = visit.page
        latent = page.locator(".latent").first
        tokens = latent.locator("li").first.locator(".tok")
        assert tokens.all_inner_texts() == ["the", "fox", "rested", "."]
        shades = tokens.evaluate_all("all => all.map((e) => getComputedStyle(e).backgroundColor)")
        assert len({shades[0], shades[1], shades[2]}) == 3, shades
        assert shades[0] == shades[3]
        assert latent.locator(".tok.at").count() == 2
        assert page.locator(".latents[open]").count() == 1, "only the first autoencoder's are unfolded"
        page.locator(".latents summary").nth(1).click()
        assert page.locator(".latents[open]").count() == 2


def test_tables_of_autoencoders_sort(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["sae"]) as visit:
        table = visit.page.locator("#record table").first
        table.locator("th", has_text="FVU").locator("button").click()
        values = [float(text) for text in table.locator("tbody td:nth-child(6)").all_inner_texts()]
        assert values == sorted(values) and len(values) == 4


def test_ranges_of_a_precision_report_stand_between_the_limits(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["precision"]) as visit:
        page = visit.page
        inside(page, "#ranges svg", "rect")
        inside(page, "#ranges svg", "text")
        largest = page.locator("#ranges .limit.edge").nth(1).bounding_box()
        over = page.locator("#ranges g.bad rect").bounding_box()
        assert largest is not None and over is not None
        assert over["x"] + over["width"] > largest["x"], "what overflows reaches past the largest number"
        assert page.locator("#ranges").get_by_text("all zero").is_visible()


def test_a_steering_evaluation_draws_its_dose_and_its_cost(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["evaluation"]) as visit:
        page = visit.page
        assert page.locator("h1").inner_text() == "joy steers: testbed:animal rises with its strength"
        dose = page.locator("#dose svg")
        assert dose.count() == 1
        assert dose.locator("circle").count() == 15
        assert dose.locator(".faint .line").count() == 2, "random directions are faint"
        assert dose.locator("path.band").count() == 1
        inside(page, "#dose svg", "circle")
        assert page.locator("#cost svg circle").count() == 5
        assert page.locator("#scores tbody tr").count() >= 5


def test_commits_show_the_first_bad_one_and_its_curve(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["commits"]) as visit:
        page = visit.page
        assert page.locator("tr.first").count() == 1
        assert "cccccccccccc" in page.locator("tr.first").inner_text()
        assert page.locator("#metrics svg path.curve").count() == 4
        assert page.locator("#metrics svg path.curve.first").count() == 1
        assert page.locator("#metrics svg .cross").count() == 1, "where the loss is infinite"
        inside(page, "#metrics svg", ".curve")


def test_vectors_show_the_matrix_with_signs_apart(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["vectors"]) as visit:
        page = visit.page
        cells = page.locator("#matrix table tbody td")
        assert cells.count() == 9
        texts = cells.all_inner_texts()
        assert sorted(text for text in texts if text) == ["-0.42", "-0.42", "0.05", "0.05", "0.61", "0.61"]
        colours = cells.evaluate_all("all => all.map((e) => getComputedStyle(e).backgroundColor)")
        assert colours[texts.index("-0.42")] != colours[texts.index("0.61")]
        assert page.locator("#pairs tbody tr").count() == 3


@pytest.mark.parametrize(("name", "panels"), [("training", 4), ("sae_run", 4), ("extraction", 0), ("cleaning", 0)])
def test_trainings_draw_their_curves(browser: Browser, pages: dict[str, Path], name: str, panels: int) -> None:
    with Visit(browser, pages[name]) as visit:
        page = visit.page
        assert page.locator("#curves svg").count() == panels
        if panels:
            inside(page, "#curves svg", ".curve")
        assert page.locator("#record tbody tr").count() >= 1
