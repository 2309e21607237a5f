from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from tests.unit.report import comparison_factory, factory
from trimtab.errors import InputError
from trimtab.report import _html, _payload, render_html, render_json, render_text, report
from trimtab.results import Analysis, Comparison, from_json

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}&lt;\"'\u2028\x00\x1b[2J\ud800"


class Page(HTMLParser):
    """Tags with attributes, text of scripts, and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data


def hostile() -> Analysis:
    """Every text that a run can bring in is hostile."""
    whole = factory.small()
    return dataclasses.replace(
        whole,
        title=HOSTILE,
        model=HOSTILE,
        run=HOSTILE,
        steering=HOSTILE,
        command=HOSTILE,
        environment={HOSTILE: HOSTILE},
        reason=HOSTILE,
        prompts=tuple(dataclasses.replace(prompt, text=HOSTILE) for prompt in whole.prompts),
        configs=tuple(dataclasses.replace(row, label=row.label + HOSTILE) for row in whole.configs),
        agreements=tuple(
            dataclasses.replace(
                item,
                config=item.config + HOSTILE,
                tokens=(HOSTILE,) * len(item.tokens),
                reference_tokens=(HOSTILE,) * len(item.reference_tokens),
                explanation=HOSTILE,
            )
            for item in whole.agreements
        ),
        drift=tuple(dataclasses.replace(cell, config=cell.config + HOSTILE) for cell in whole.drift),
        ledger=dataclasses.replace(whole.ledger, problems=(HOSTILE,)),
    )


def test_hostile_text_stays_text() -> None:
    plain, page = Page(render_html(factory.small())), Page(render_html(hostile()))
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script"] * 4
    assert [tag for tag, _ in plain.tags if tag == "script"] == ["script"] * 4
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "49" not in page.text.split("Configurations")[0]
    assert HOSTILE.split("\u2028")[0] in page.text


def test_hostile_text_survives_in_the_data() -> None:
    page = Page(render_html(hostile()))
    payload = json.loads(page.scripts[1])
    assert payload["prompts"][0]["text"] == HOSTILE.replace("\ud800", "?")
    assert "<" not in page.scripts[1]


def test_hostile_comparison_stays_text() -> None:
    pairs = comparison_factory.comparison()
    bad = dataclasses.replace(
        pairs,
        reason=HOSTILE,
        candidate=HOSTILE,
        plan=(HOSTILE,),
        warnings=(HOSTILE,),
        records=tuple(dataclasses.replace(one, reasons=(HOSTILE,), waived_by=HOSTILE) for one in pairs.records),
    )
    page = Page(render_html(bad))
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script"]
    assert "\x1b" not in render_text(bad)


def test_hostile_text_cannot_move_the_cursor() -> None:
    text = render_text(hostile())
    assert not set(text) & {"\x1b", "\x00", "\ud800"}
    assert "\\x1b[2J" in text


def test_only_the_known_scripts_may_run() -> None:
    page = Page(render_html(factory.small()))
    policy = next(a["content"] or "" for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    running = [page.scripts[i] for i, (_, a) in enumerate(x for x in page.tags if x[0] == "script") if "type" not in a]
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running} == allowed
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy


@pytest.mark.parametrize("make", [factory.small, factory.bare, comparison_factory.comparison])
def test_page_is_self_contained_and_accessible(make: object) -> None:
    page = Page(render_html(make()))  # type: ignore[operator]
    links = [a.get("src") or a.get("href") for _, a in page.tags if "src" in a or "href" in a]
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link and link.startswith("#")} <= set(ids)
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(ids)
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert all("aria-label" in a for _, a in page.tags if a.get("role") in ("img", "region"))
    assert not any("onclick" in a for _, a in page.tags)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1


def test_a_large_run_stays_under_three_megabytes() -> None:
    whole = factory.analysis()
    drift = tuple(dataclasses.replace(cell, prompt=cell.prompt + 4 * k) for k in range(40) for cell in whole.drift)
    pairs = tuple(dataclasses.replace(item, prompt=item.prompt + 4 * k) for k in range(40) for item in whole.agreements)
    page = render_html(dataclasses.replace(whole, drift=drift, agreements=pairs))
    assert len(page.encode()) < 3_000_000
    assert "left out of these figures" in page


def test_one_prompt_alone_over_the_budget_is_still_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_payload, "BUDGET", 1)
    page = render_html(factory.small())
    assert "1 prompt and 4 metrics left out of these figures" in page


@pytest.mark.parametrize("suffix", [".html", ".json", ".txt", ".HTML"])
def test_ending_chooses_the_form(tmp_path: Path, suffix: str) -> None:
    result = factory.bare()
    path = tmp_path / f"out{suffix}"
    path.write_text("old")
    assert report(result, path) == path
    form = {".html": render_html, ".json": render_json, ".txt": render_text}[suffix.lower()]
    assert path.read_text(encoding="utf-8") == form(result)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_without_a_path_the_text_is_returned() -> None:
    assert report(factory.bare()) == render_text(factory.bare())


@pytest.mark.parametrize("name", ["out.pdf", "out", "out.htm"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"use \.html, \.json or \.txt"):
        report(factory.bare(), tmp_path / name)


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no directory .*absent.*create it first"):
        report(factory.bare(), tmp_path / "absent" / "out.html")


@pytest.mark.parametrize("render", [render_text, render_json])
@pytest.mark.parametrize("given", [{}, Analysis])
def test_what_is_no_result_is_refused(render: object, given: object) -> None:
    with pytest.raises(InputError, match=r"no report for .*: give a result such as an Analysis or a Comparison"):
        render(given)  # type: ignore[operator]


def test_other_results_have_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no page for a SweepRun: .* use \.txt or \.json"):
        report(factory.SWEEP, tmp_path / "out.html")
    assert report(factory.SWEEP, tmp_path / "out.txt").read_text() == render_text(factory.SWEEP)  # type: ignore[union-attr]


def test_a_result_is_rendered_again_from_its_json(tmp_path: Path) -> None:
    for result in (factory.small(), comparison_factory.comparison()):
        source = report(result, tmp_path / "result.json")
        again = Path(report(source, tmp_path / "again.html"))
        assert again.read_text(encoding="utf-8") == render_html(result)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "not JSON: .* line 1"),
        (b"\xff", "is not text: invalid start byte at byte 0"),
        (b"[1]", "expected the JSON of an Analysis or a Comparison"),
        (b'{"kind": "sweep"}', "expected the JSON of an Analysis or a Comparison"),
        (b'{"kind": "analysis"}', "not a Analysis document"),
        (None, "no such file"),
    ],
)
def test_files_that_hold_no_result_are_refused(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        report(path)


def test_a_directory_that_holds_one_result_stands_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a directory: give the JSON file of a result$"):
        report(tmp_path)
    for name, text in (("plan", "{}"), ("torn", "{"), ("list", "[1]")):
        (tmp_path / f"{name}.json").write_text(text)
    report(comparison_factory.comparison(), tmp_path / "kept.json")
    assert report(tmp_path) == render_text(comparison_factory.comparison())
    report(factory.small(), tmp_path / "second.json")
    with pytest.raises(InputError, match=r"is a directory: .* of kept\.json, second\.json$"):
        report(tmp_path)


@pytest.mark.parametrize(("make", "kind"), [(factory.analysis, Analysis), (comparison_factory.comparison, Comparison)])
def test_json_reads_back(tmp_path: Path, make: object, kind: type) -> None:
    result = make()  # type: ignore[operator]
    text = report(result, tmp_path / "out.json").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert render_json(from_json(kind, text)) == text
    assert json.loads(text)["format_version"] == 1


def test_lone_surrogates_survive_in_json(tmp_path: Path) -> None:
    path = report(hostile(), tmp_path / "out.json")
    assert json.loads(Path(path).read_text(encoding="utf-8"))["title"] == HOSTILE


@pytest.mark.parametrize("width", [80, 120, 200])
def test_text_keeps_its_width(width: int) -> None:
    for result in (factory.analysis(), comparison_factory.comparison()):
        assert max(map(len, render_text(result, width=width).splitlines())) <= width


def test_text_has_colour_only_when_asked() -> None:
    assert "\x1b[" in render_text(factory.small(), color=True)
    assert "\x1b" not in render_text(factory.small())


def test_text_names_non_finite_values() -> None:
    assert re.search(r"float16 .* inf ", render_text(factory.analysis()))


def test_report_needs_no_torch() -> None:
    code = """
import sys
from tests.unit.report import comparison_factory, factory
from trimtab.report import render_html, render_json, render_text
for result in (factory.bare(), comparison_factory.comparison()):
    render_html(result), render_json(result), render_text(result)
heavy = {"torch", "transformers", "numpy", "polars", "plotly"} & set(sys.modules)
assert not heavy, heavy
"""
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert run.returncode == 0, run.stderr


def test_bundle_is_the_one_that_is_documented() -> None:
    assets = resources.files("trimtab.report").joinpath("assets")
    digest = hashlib.sha256(assets.joinpath("plotly-cartesian.min.js").read_bytes()).hexdigest()
    readme = assets.joinpath("README.md").read_text()
    assert digest in readme
    version = re.search(r"v(\d+\.\d+\.\d+)", assets.joinpath("plotly-cartesian.min.js").read_text()[:200])
    assert version is not None
    assert version[1] in readme
    assert "MIT License" in assets.joinpath("plotly-LICENSE.txt").read_text()


@pytest.mark.parametrize("name", ["report.css", "page.js", "analysis.js", "plotly-cartesian.min.js"])
def test_assets_cannot_end_their_element(name: str) -> None:
    text = _html._asset(name)
    assert "</script" not in text.lower()
    assert "</style" not in text.lower()
    assert "<!--" not in text
