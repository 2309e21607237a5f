"""Reports equal their gold files. To write them anew: TRIMTAB_UPDATE_GOLD=1 pytest tests/unit/report/test_gold.py

A mismatch is saved in tests/actual/report, next to which `diff -r tests/gold/report tests/actual/report` shows it.
Style, scripts, their hashes and the version are scrubbed, so the files change only when the content of a report does.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.unit.report import comparison_factory, factory
from trimtab import __version__
from trimtab.report import render_html, render_json, render_text
from trimtab.report._html import _asset

TESTS = Path(__file__).parents[2]
RESULTS = {"analysis": factory.small, "bare": factory.bare, "comparison": comparison_factory.comparison}
FORMS = {"html": render_html, "json": render_json, "txt": render_text}
ASSETS = ("report.css", "page.js", "analysis.js", "plotly-cartesian.min.js")


def scrub(text: str) -> str:
    for name in ASSETS:
        text = text.replace(_asset(name), f"[{name}]")
    text = re.sub(r"sha256-[A-Za-z0-9+/=]+", "sha256-HASH", text)
    return text.replace(f"rimtab {__version__}", "rimtab VERSION")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RESULTS)
def test_report_equals_its_gold_file(name: str, form: str) -> None:
    actual = scrub(FORMS[form](RESULTS[name]()))
    gold = TESTS / "gold" / "report" / f"{name}.{form}"
    if os.environ.get("TRIMTAB_UPDATE_GOLD"):
        gold.parent.mkdir(parents=True, exist_ok=True)
        gold.write_text(actual, encoding="utf-8")
    if not gold.exists() or gold.read_text(encoding="utf-8") != actual:
        saved = TESTS / "actual" / "report" / gold.name
        saved.parent.mkdir(parents=True, exist_ok=True)
        saved.write_text(actual, encoding="utf-8")
        pytest.fail(f"{gold} differs from what was rendered, saved in {saved}")


def test_gold_files_hold_no_asset() -> None:
    for path in (TESTS / "gold" / "report").glob("*.html"):
        assert path.stat().st_size < 100_000, f"{path.name}: an asset was not scrubbed"
