"""The page of an analysis of weights in headless Chromium: all figures follow one choice, in both widths and themes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.weights.weights_pairs import directions, noisy, saved_pair
from trimtab.report import report
from trimtab.weights import measure_attention, measure_mlp, measure_susceptibility

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
MEASURES = {"susceptibility": measure_susceptibility, "mlp": measure_mlp, "attention": measure_attention}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    models = saved_pair(folder, noisy, layers=4)
    return {
        name: Path(report(measure(*models, directions(), controls=16).report, folder / f"{name}.html")).as_uri()
        for name, measure in MEASURES.items()
    }


class Visit:
    """One page with a record of what went wrong on it."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, theme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("html[data-ready=true]")
        self.page.wait_for_selector("#heat-plot .heatmaplayer image")

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (400, "dark")])
@pytest.mark.parametrize("name", MEASURES)
def test_a_page_loads_alone_and_fits(
    browser: Browser, pages: dict[str, str], name: str, width: int, theme: str
) -> None:
    with Visit(browser, pages[name], width, theme) as visit:
        assert visit.messages == [] and visit.requests == [pages[name]]
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        figures = [
            "profile",
            "ranking",
            "heat",
            "scatter",
            "groups-figure",
            *(["heads"] if name == "attention" else []),
        ]
        for one in figures:
            assert visit.page.locator(f"#{one}-plot .main-svg").count() > 0, one
            box = visit.page.locator(f"#{one}-plot").bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width + 1
        assert visit.page.locator("#rankings tbody tr").count() > 20


def test_one_choice_drives_all_figures(browser: Browser, pages: dict[str, str]) -> None:
    from playwright.sync_api import expect

    with Visit(browser, pages["attention"]) as visit:
        page = visit.page
        read = """() => Object.fromEntries(['profile', 'ranking', 'heat', 'scatter', 'heads'].map((id) => {
            const traces = document.getElementById(id + '-plot').data;
            return [id, JSON.stringify(traces.map((one) => [one.x, one.y, one.z, one.marker?.size]))];
        }))"""
        first = page.evaluate(read)
        page.select_option("#layer-choice", "0" if page.input_value("#layer-choice") != "0" else "1")
        second = page.evaluate(read)
        assert {key for key in first if first[key] != second[key]} >= {"ranking", "scatter"}
        options = page.locator("#view-choice option").all_text_contents()
        page.select_option("#view-choice", label=next(one for one in options if one.startswith("vo: promotion")))
        third = page.evaluate(read)
        assert {key for key in second if second[key] != third[key]} >= {"profile", "ranking", "heat", "heads"}
        page.locator("#quantity-choice label", has_text="Change").click()
        fourth = page.evaluate(read)
        assert third["heat"] != fourth["heat"] and third["profile"] != fourth["profile"]
        page.select_option("#direction-choice", label="role d3")
        fifth = page.evaluate(read)
        drawn = page.locator("#heat-plot").text_content() or ""
        assert "d3 (role)" in drawn and "d3 (trait)" in drawn and "PC1 (pc)" not in drawn  # one name, two directions
        assert fourth["profile"] != fifth["profile"] and fourth["scatter"] != fifth["scatter"]
        # A click on the heat map chooses a layer and a direction.
        page.locator("#heat-plot").scroll_into_view_if_needed()
        box = page.locator("#heat-plot .nsewdrag").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] * 0.88, box["y"] + box["height"] * 0.4)
        page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.4)
        expect(page.locator("#layer-choice")).to_have_value("3")
        assert visit.messages == []


def test_tables_hold_the_numbers_and_sort(browser: Browser, pages: dict[str, str]) -> None:
    with Visit(browser, pages["mlp"]) as visit:
        page = visit.page
        page.locator('[data-table="heat"] summary').click()
        assert page.locator('[data-table="heat"] tbody tr').count() == 24
        page.locator("#rankings th button", has_text="layer").click()
        column = page.locator("#rankings tbody td:nth-child(5)").all_text_contents()
        numbers = [int(one) for one in column if one != "mean"]
        assert numbers == sorted(numbers) and len(set(numbers)) > 1
