"""What the page and the text of an analysis say."""

from __future__ import annotations

import base64
import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.weights.weights_pairs import directions, noisy, saved_pair
from trimtab.report import render_html, render_text, report
from trimtab.report._weights import view
from trimtab.report._weights_payload import payload
from trimtab.results import from_json, to_json
from trimtab.results.weights import WeightsAnalysis
from trimtab.weights import measure_attention, measure_mlp, measure_susceptibility

MEASURES = {"susceptibility": measure_susceptibility, "mlp": measure_mlp, "attention": measure_attention}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WeightsAnalysis]:
    models = saved_pair(tmp_path_factory.mktemp("report"), noisy)
    found = {name: measure(*models, directions(), average_layers=True).report for name, measure in MEASURES.items()}
    return {**found, "identical": measure_mlp(models[0], models[0], directions()).report}


@pytest.mark.parametrize("name", [*MEASURES, "identical"])
def test_a_report_comes_back_and_renders(name: str, results: dict[str, WeightsAnalysis], tmp_path: Path) -> None:
    one = results[name]
    assert to_json(from_json(WeightsAnalysis, to_json(one))) == to_json(one)
    (tmp_path / "weights.json").write_text(to_json(one))
    page = Path(report(tmp_path / "weights.json", tmp_path / "page.html")).read_text()
    assert len(page) < 3_000_000 and "://" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    text = render_text(one)
    assert view(one).headline in " ".join(text.split())
    for table in view(one).tables:
        assert f'<h2 id="{table.anchor}-title">{table.title}</h2>' in page
        assert table.title in text


def test_the_payload_holds_the_numbers(results: dict[str, WeightsAnalysis]) -> None:
    one = results["attention"]
    packed = payload(one)
    found = next(x for x in packed["views"] if (x["part"], x["measure"], x["sign"]) == ("vo", "change", 1))
    data = base64.b64decode(found["grids"]["z"])
    values = struct.unpack(f"<{len(data) // 4}f", data)
    expected = next(grid for grid in one.grids if (grid.part, grid.measure, grid.quantity) == ("vo", "change", "z"))
    flat = [value for row in expected.values for value in row]
    assert values == pytest.approx(flat, rel=1e-6)
    assert packed["left_out"] == 0 and len(packed["directions"]) == len(one.directions)


def test_directions_that_do_not_fit_are_counted(
    results: dict[str, WeightsAnalysis], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.report import _weights_payload

    one = results["mlp"]
    monkeypatch.setattr(_weights_payload, "BUDGET", 8000)
    packed = payload(one)
    assert 0 < len(packed["directions"]) < len(one.directions)
    assert packed["left_out"] == len(one.directions) - len(packed["directions"])
    loudest = next(x for x in one.rankings if x.measure != "cosine_distance" and x.layer is not None)
    assert {"name": loudest.direction, "kind": loudest.kind} in packed["directions"]
    assert f"{packed['left_out']} directions that stand out less" in render_html(one)


def test_nothing_changed_is_said(results: dict[str, WeightsAnalysis]) -> None:
    assert view(results["identical"]).headline == "Nothing changed: every measured change is exactly zero"
    assert not results["mlp"].identical


def test_what_stands_out_is_named(results: dict[str, WeightsAnalysis]) -> None:
    one = results["mlp"]
    best = next(x for x in one.rankings if x.layer is not None and x.measure == "excess")
    long = replace(best, z=99.0, measure="absolute", rank=1)  # long answers move most whatever was trained
    loud = replace(one, rankings=(long, replace(best, rank=2, z=9.0, direction="pirate", kind="role", layer=2)))
    assert view(loud).headline == "The MLP of layer 2 changed most: how it treats role pirate"
    assert view(replace(one, rankings=(replace(best, z=2.0),))).headline.startswith("No direction stands out")


def test_names_cannot_break_the_page(results: dict[str, WeightsAnalysis]) -> None:
    one = results["mlp"]
    hostile = "</script><img src=x onerror=alert(1)>"
    rows = (replace(one.directions[0], name=hostile), *one.directions[1:])
    ranked = (replace(one.rankings[0], direction=hostile), *one.rankings[1:])
    page = render_html(replace(one, directions=rows, rankings=ranked, base="\x1b[2J"))
    assert hostile not in page and "<img" not in page and "\x1b" not in page
    data = re.search(r'<script type="application/json" id="payload">(.*?)</script>', page, re.DOTALL)
    assert data is not None and json.loads(data[1])["directions"][0]["name"] == hostile
