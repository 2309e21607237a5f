"""The page of a triage in headless Chromium: what a reader sees, in both widths and both themes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.report import triage_factory
from trimtab.report import report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

HOSTILE = "</script><img src=x onerror=alert(1)><b>bold</b>"


class Visit:
    """One page with a record of what went wrong on it."""

    def __init__(self, browser: Browser, file: Path, width: int = 1280, theme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=theme,  # type: ignore[arg-type]
        )
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


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("triage")
    made = {"whole": triage_factory.triage(), "bare": triage_factory.bare(), "hostile": triage_factory.triage(HOSTILE)}
    return {name: Path(report(result, folder / f"{name}.html")) for name, result in made.items()}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["whole", "bare", "hostile"])
def test_page_loads_alone_and_fits(browser: Browser, pages: dict[str, Path], name: str, width: int, theme: str) -> None:
    with Visit(browser, pages[name], width, theme) as visit:
        assert visit.messages == []
        assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        outside = visit.page.evaluate(
            """width => [...document.querySelectorAll("main *")]
                .filter((e) => !e.closest(".scroll, .svg, .hidden, pre"))
                .filter((e) => e.getBoundingClientRect().right > width + 1)
                .map((e) => e.tagName + "." + e.className)""",
            width,
        )
        assert outside == []


def test_the_answer_and_its_figures_are_there(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["whole"]) as visit:
        page = visit.page
        assert "layers.2.attn" in page.inner_text("h1")
        assert page.locator(".answers > div").count() == 4
        heats = page.locator("table.heat")
        assert heats.count() == 2 and heats.first.is_visible() and not heats.nth(1).is_visible()
        outlined = page.locator("table.heat td.first")
        assert outlined.count() == 1 and "attn.output" in (outlined.get_attribute("title") or "")
        assert page.locator(".svg .call").count() == 7 and page.locator(".svg .call.made").count() == 1
        assert page.locator(".strips .line").count() == 2 and page.locator(".strips .line.first").count() == 1
        assert page.locator(".strips .nonfinite").count() == 1
        assert "proved" in page.inner_text("#source h3 .verdict")


def test_colours_of_the_ramp_differ_in_both_themes(browser: Browser, pages: dict[str, Path]) -> None:
    for theme in ("light", "dark"):
        with Visit(browser, pages["whole"], theme=theme) as visit:
            found = visit.page.evaluate(
                "[...document.querySelectorAll('.ramp8 i')].slice(0, 10)"
                ".map((e) => getComputedStyle(e).backgroundColor)"
            )
            assert len(set(found)) == 10, found


def test_fields_of_a_strip_are_as_wide_as_their_rows(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["whole"]) as visit:
        widths = visit.page.evaluate(
            "[...document.querySelectorAll('.strips .line.first .cells i')].map((e) => e.getBoundingClientRect().width)"
        )
        assert len(widths) == 2 and 12 < widths[1] / widths[0] < 18


def test_hostile_names_stay_text(browser: Browser, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["hostile"]) as visit:
        assert visit.page.locator("main img, main b").count() == 0
        assert "onerror" in visit.page.inner_text("h1")


def test_without_scripts_everything_can_be_read(browser: Browser, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["whole"].as_uri())
    assert page.locator("table.heat").first.is_visible()
    assert re.search(r"Next: apply the patch", page.inner_text("main"))
    context.close()
