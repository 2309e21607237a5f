"""Reports in headless Chromium: what a reader sees, in both widths and both themes."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.unit.report import comparison_factory, factory
from trimtab.report import report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.browser

RESULTS = {"analysis": factory.analysis, "bare": factory.bare, "comparison": comparison_factory.comparison}
HOSTILE = "</script><img src=x onerror=alert(1)><b>bold</b>"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The URL of each report on disk."""
    folder = tmp_path_factory.mktemp("reports")
    return {name: Path(report(make(), folder / f"{name}.html")).as_uri() for name, make in RESULTS.items()}


class Visit:
    """One page with a record of what went wrong on it."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, theme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=theme,  # type: ignore[arg-type]
            reduced_motion="reduce",
        )
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def ready(self) -> Page:
        self.page.wait_for_selector("html[data-ready=true]")
        self.page.wait_for_selector("#drift-plot .heatmaplayer image")
        return self.page

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def colours(locator: Locator) -> int:
    """Number of distinct colours, each channel in steps of 16."""
    picture = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    reduced = picture.point(lambda value: value // 16)
    return len(reduced.getcolors(maxcolors=reduced.width * reduced.height) or [])


def luminance(page: Page) -> float:
    channels = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number)")
    return sum(channels[:3]) / 3


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", RESULTS)
def test_page_loads_alone_and_fits(browser: Browser, pages: dict[str, str], name: str, width: int, theme: str) -> None:
    with Visit(browser, pages[name], width, theme) as visit:
        page = visit.ready() if name == "analysis" else visit.page
        assert visit.messages == []
        assert [url for url in visit.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert len([url for url in visit.requests if url.startswith("file:")]) == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """width => [...document.querySelectorAll("main *")]
                .filter((e) => !e.closest(".scroll, .svg, .plot, .hidden"))
                .filter((e) => e.getBoundingClientRect().right > width + 1)
                .map((e) => e.outerHTML.slice(0, 80))""",
            width,
        )
        assert outside == []
        assert (luminance(page) > 128) == (theme == "light")
        assert page.locator("h1").is_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_figures_are_drawn(browser: Browser, pages: dict[str, str], width: int, theme: str) -> None:
    with Visit(browser, pages["analysis"], width, theme) as visit:
        page = visit.ready()
        assert colours(page.locator("#drift-plot .heatmaplayer")) > 20
        for figure in ("bylayer", "cap", "logprobs", "scatter"):
            assert page.locator(f"#{figure}-plot .scatterlayer .trace").count() > 0, figure
            assert colours(page.locator(f"#{figure}-plot")) > 4, figure
            assert page.locator(f"#{figure}-keys .key").count() > 0, figure


@pytest.mark.parametrize("width", [1280, 400])
def test_first_divergence_is_marked(browser: Browser, pages: dict[str, str], width: int) -> None:
    with Visit(browser, pages["analysis"], width) as visit:
        page = visit.ready()
        first = page.locator("#strip li.first")
        assert first.count() == 1
        assert first.is_visible()
        assert first.locator(".at").inner_text() == "8 first difference"
        assert first.locator(".reference").inner_text() != first.locator(".candidate").inner_text()
        assert page.locator("#strip li").count() == factory.STEPS
        assert page.locator("#strip li.after").count() == factory.STEPS - 9
        assert page.locator("#strip li:not(.after):not(.first).differs").count() == 0
        assert "0.01 nats" in page.locator("#parting").inner_text()
        assert page.locator("#drift-plot .shapelayer path").count() == 1
        assert "first difference, token 8" in page.locator("#drift-plot .annotation-text").first.text_content()


def test_heat_map_draws_each_cell_in_its_place(browser: Browser, pages: dict[str, str]) -> None:
    whole = factory.analysis()
    with Visit(browser, pages["analysis"]) as visit:
        drawn = visit.ready().evaluate("document.getElementById('drift-plot').data[0].z")
        for cell in whole.drift:
            if (cell.config, cell.prompt) == ("bf16", 3) and cell.rel_l2 > 0:
                assert drawn[cell.layer][cell.step] == pytest.approx(math.log10(cell.rel_l2), abs=1e-6)


def test_dimmed_tokens_are_fainter_than_equal_ones(browser: Browser, pages: dict[str, str]) -> None:
    with Visit(browser, pages["analysis"]) as visit:
        page = visit.ready()
        ink = "(e) => getComputedStyle(e).color"
        before = page.locator("#strip li .chip").first.evaluate(ink)
        after = page.locator("#strip li.after .chip").first.evaluate(ink)
        assert before != after


def test_keyboard_reaches_and_works_the_choices(browser: Browser, pages: dict[str, str]) -> None:
    with Visit(browser, pages["analysis"]) as visit:
        page = visit.ready()
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.append(
                page.evaluate(
                    "document.activeElement.id || document.activeElement.name || document.activeElement.className"
                )
            )
            if seen[-1] == "metric-choice":
                break
        assert seen[0] == "skip"
        order = [seen.index(name) for name in ("theme", "config", "prompt-choice", "metric-choice")]
        assert order == sorted(order)

        plot = page.locator("#drift-plot .heatmaplayer")
        before = plot.screenshot()
        page.keyboard.press("ArrowDown")
        assert page.locator("#metric-choice").input_value() == "mae"
        assert plot.screenshot() != before, "another metric draws other colours"
        for _ in range(4):
            page.keyboard.press("Shift+Tab")
            if page.evaluate("document.activeElement.name") == "config":
                break
        before = plot.screenshot()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.value") == "bf16_cap_fp32"
        assert page.locator("#config-choice input:checked").input_value() == "bf16_cap_fp32"
        assert plot.screenshot() != before, "another configuration draws other colours"
        page.keyboard.press("Tab")
        page.keyboard.press("Home")
        assert page.locator("#prompt-choice").input_value() == "0"
        assert page.locator("#strip li.first .at").inner_text() == "23 first difference"


def test_focus_is_visible(browser: Browser, pages: dict[str, str]) -> None:
    with Visit(browser, pages["analysis"]) as visit:
        page = visit.ready()
        page.keyboard.press("Tab")
        assert page.locator(".skip").bounding_box()["y"] >= 0  # type: ignore[index]
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.locator("#prompt-choice").focus()
        page.keyboard.press("Shift+Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement.closest('label')).outlineStyle")
        assert outline == "solid"


def test_theme_button_switches_and_redraws(browser: Browser, pages: dict[str, str]) -> None:
    with Visit(browser, pages["analysis"]) as visit:
        page = visit.ready()
        plot = page.locator("#drift-plot .heatmaplayer")
        before = plot.screenshot()
        button = page.locator("#theme")
        assert button.get_attribute("aria-label") == "Use the dark theme"
        button.focus()
        page.keyboard.press("Enter")
        assert luminance(page) < 128
        assert button.get_attribute("aria-label") == "Use the light theme"
        assert plot.screenshot() != before
        page.reload()
        visit.ready()
        assert luminance(page) < 128, "the choice is kept"


def test_show_button_chooses_its_generation(browser: Browser, pages: dict[str, str]) -> None:
    with Visit(browser, pages["analysis"]) as visit:
        page = visit.ready()
        page.locator("button.show[data-config=bf16][data-prompt='2']").click()
        assert page.locator("#config-choice input:checked").input_value() == "bf16"
        assert page.locator("#prompt-choice").input_value() == "2"
        assert page.locator("#strip li.first .at").inner_text() == "29 first difference"
        assert page.evaluate("document.activeElement.name") == "config"


def test_each_figure_has_its_numbers_as_a_table(browser: Browser, pages: dict[str, str]) -> None:
    whole = factory.analysis()
    with Visit(browser, pages["analysis"]) as visit:
        page = visit.ready()
        for figure in ("bylayer", "drift", "cap", "logprobs", "scatter"):
            page.locator(f"[data-table={figure}] summary").click()
            page.locator(f"[data-table={figure}] tbody tr").first.wait_for()
        cell = next(c for c in whole.drift if (c.config, c.prompt, c.step, c.layer) == ("bf16", 3, 7, 2))
        shown = page.locator("[data-table=drift] tbody tr").nth(7).locator("td").nth(2).inner_text()
        assert float(shown) == pytest.approx(cell.rel_l2, rel=5e-3)
        page.locator("#config-choice input[value=float16]").check(force=True)
        page.locator("#prompt-choice").select_option("2")
        shown = page.locator("[data-table=drift] tbody tr").nth(31).locator("td").nth(5).inner_text()
        assert shown == "inf"
        assert "inf or nan" in page.locator("#ramp").inner_text()


def test_tables_sort_by_their_numbers(browser: Browser, pages: dict[str, str]) -> None:
    with Visit(browser, pages["comparison"]) as visit:
        page = visit.page
        head = page.locator("table.verdicts th", has_text="rel_l2")
        column = page.locator("table.verdicts tbody td:nth-child(4)")
        for direction in ("ascending", "descending"):
            head.locator("button").click()
            assert head.get_attribute("aria-sort") == direction
            values = [float(text) for text in column.all_inner_texts() if text != "-"]
            assert len(values) == 23
            assert values == sorted(values, reverse=direction == "descending")


def test_copy_offers_the_exact_command(browser: Browser, pages: dict[str, str]) -> None:
    with Visit(browser, pages["analysis"]) as visit:
        page = visit.ready()
        visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
        box = page.locator(".command").first
        assert box.locator("code").inner_text() == factory.analysis().command
        box.locator("button").click()
        box.locator("button", has_text=re.compile("Copied|Selected")).wait_for()
        if box.locator("button").inner_text() == "Copied":
            assert page.evaluate("navigator.clipboard.readText()") == factory.analysis().command
        else:
            assert page.evaluate("getSelection().toString()").strip() == factory.analysis().command


def test_hostile_texts_run_nothing(browser: Browser, tmp_path: Path) -> None:
    whole = factory.small()
    bad = dataclasses.replace(
        whole,
        title=HOSTILE,
        prompts=tuple(dataclasses.replace(one, text=HOSTILE) for one in whole.prompts),
        agreements=tuple(
            dataclasses.replace(one, tokens=(HOSTILE,) * len(one.tokens), explanation=HOSTILE)
            for one in whole.agreements
        ),
        logprobs=tuple(dataclasses.replace(one, top=HOSTILE, reference_top=HOSTILE + "2") for one in whole.logprobs),
    )
    url = Path(report(bad, tmp_path / "hostile.html")).as_uri()
    with Visit(browser, url) as visit:
        page = visit.ready()
        assert page.locator("img, main b").count() == 0
        assert visit.messages == []
        assert page.locator("#prompt-text").inner_text() == HOSTILE
        assert page.locator("#strip .candidate").first.inner_text() == HOSTILE


def test_without_scripts_the_answer_and_the_tables_remain(browser: Browser, pages: dict[str, str]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["analysis"])
    assert page.locator("h1").is_visible()
    assert page.locator("table.configs").is_visible()
    assert page.get_by_text("The figures here need JavaScript").is_visible()
    assert not page.locator("#controls").is_visible()
    context.close()


def test_print_is_light_and_without_controls(browser: Browser, pages: dict[str, str]) -> None:
    with Visit(browser, pages["analysis"], theme="dark") as visit:
        page = visit.ready()
        page.emulate_media(media="print")
        assert luminance(page) > 128
        assert not page.locator("#controls").is_visible()
        assert page.pdf()[:5] == b"%PDF-"
        assert visit.messages == []
