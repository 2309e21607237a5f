from __future__ import annotations

import base64
import dataclasses
import json
import math
import statistics
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.report import factory
from trimtab._base import jsonio
from trimtab.report import _payload
from trimtab.results import Analysis


@pytest.fixture(scope="module")
def whole() -> Analysis:
    return factory.analysis()


def unpack(text: str) -> tuple[float, ...]:
    data = base64.b64decode(text)
    return struct.unpack(f"<{len(data) // 4}f", data)


@given(st.lists(st.floats(width=32)))
def test_pack_keeps_every_float32(values: list[float]) -> None:
    assert list(map(repr, unpack(_payload.pack(values)))) == list(map(repr, values))


def test_pack_turns_what_float32_cannot_hold_into_infinity() -> None:
    assert unpack(_payload.pack([1e300, -1e300])) == (math.inf, -math.inf)


def test_matrix_holds_each_cell_at_its_layer_and_step(whole: Analysis) -> None:
    packed = {part["index"]: part for part in _payload.payload(whole)["prompts"]}
    for cell in whole.drift[::97]:
        drift = packed[cell.prompt]["drift"][cell.config]
        place = drift["layers"].index(cell.layer) * len(drift["steps"]) + drift["steps"].index(cell.step)
        assert unpack(drift["values"]["rel_l2"])[place] == pytest.approx(cell.rel_l2, rel=1e-6)
        assert unpack(drift["values"]["mae"])[place] == pytest.approx(cell.mae, rel=1e-6)


def test_missing_cells_are_marked_not_drawn_as_equal(whole: Analysis) -> None:
    kept = tuple(cell for cell in whole.drift if (cell.step, cell.layer) != (2, 1))
    drift = _payload.payload(dataclasses.replace(whole, drift=kept))["prompts"][0]["drift"]["bf16"]
    place = 1 * len(drift["steps"]) + 2
    assert drift["missing"] == [place]
    assert math.isnan(unpack(drift["values"]["rel_l2"])[place])


def test_colour_range_ignores_zero_and_infinity(whole: Analysis) -> None:
    finite = [cell.rel_l2 for cell in whole.drift if 0 < cell.rel_l2 < math.inf]
    assert any(cell.rel_l2 == 0 for cell in whole.drift)
    assert any(math.isinf(cell.rel_l2) for cell in whole.drift)
    assert _payload.payload(whole)["ranges"]["rel_l2"] == [min(finite), max(finite)]


def test_by_layer_means_are_over_finite_rows(whole: Analysis) -> None:
    rows = {row["config"]: row for row in _payload.payload(whole)["by_layer"]}
    cells = [c.rel_l2 for c in whole.drift if (c.config, c.layer) == ("float16", 5)]
    assert rows["float16"]["nonfinite"][5] == sum(map(math.isinf, cells)) == 1
    assert rows["float16"]["mean"][5] == pytest.approx(statistics.fmean(filter(math.isfinite, cells)), rel=1e-5)
    assert rows["float16"]["max"][5] == pytest.approx(max(filter(math.isfinite, cells)), rel=1e-5)


def test_clamp_rate_is_over_prompts(whole: Analysis) -> None:
    rates = {row["config"]: row for row in _payload.payload(whole)["clamp_rate"]}
    clamped = [row.clamped for row in whole.cap_steps if (row.config, row.step) == ("bf16", 5)]
    assert rates["bf16"]["rate"][5] == pytest.approx(sum(clamped) / len(clamped))
    assert rates["bf16"]["rows"][5] == len(factory.PROMPTS)


def test_reference_has_no_choice_of_its_own(whole: Analysis) -> None:
    numbers = _payload.payload(whole)
    assert numbers["configs"] == ["bf16", "bf16_cap_fp32", "float16"]
    assert numbers["baseline"] == "bf16"
    assert numbers["left_out"] == {"prompts": 0, "metrics": 0}


def test_budget_drops_metrics_before_prompts(whole: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    full = sum(len(jsonio.dumps(part)) for part in _payload.payload(whole)["prompts"])
    monkeypatch.setattr(_payload, "BUDGET", full - 10_000)
    numbers = _payload.payload(whole)
    assert numbers["left_out"] == {"prompts": 0, "metrics": 3}
    assert [metric["key"] for metric in numbers["metrics"]] == ["rel_l2", "mae"]
    assert set(numbers["prompts"][0]["drift"]["bf16"]["values"]) == {"rel_l2", "mae"}


def test_budget_keeps_the_prompts_that_diverge_first(whole: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_payload, "BUDGET", 1)
    numbers = _payload.payload(whole)
    assert [part["index"] for part in numbers["prompts"]] == [3], "prompt 3 diverges at token 8, before the others"
    assert numbers["left_out"] == {"prompts": 3, "metrics": 4}


def test_figures_and_tables_show_the_same_share(whole: Analysis) -> None:
    pair = dataclasses.replace(whole.agreements[0], match_ratio=0.89999)
    part = _payload.payload(dataclasses.replace(whole, agreements=(pair,)))["prompts"][0]
    assert part["tokens"]["bf16"]["match"] == "89.9 %"


def test_payload_is_plain_json(whole: Analysis) -> None:
    assert json.loads(jsonio.dumps(_payload.payload(whole)))["reference"] == "float32"
