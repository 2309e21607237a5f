from __future__ import annotations

import dataclasses
import math

import pytest

from tests.unit.report import comparison_factory, factory
from trimtab.report import _analysis, _comparison
from trimtab.results import Analysis, Comparison


@pytest.fixture(scope="module")
def whole() -> Analysis:
    return factory.analysis()


@pytest.fixture(scope="module")
def pairs() -> Comparison:
    return comparison_factory.comparison()


def with_recommendation(whole: Analysis, **changes: object) -> Analysis:
    assert whole.recommendation is not None
    return dataclasses.replace(whole, recommendation=dataclasses.replace(whole.recommendation, **changes))


def test_three_questions_are_answered(whole: Analysis) -> None:
    same, where, helped = _analysis.view(whole).answers
    assert same.question == "Does bf16 generate the same tokens as float32?"
    assert (same.short, same.tone) == ("No: 58.7 % are equal", "bad")
    assert "1 of 4 prompts identical" in same.detail
    assert "significant drift" in same.detail
    assert where.short == "Token 8 of prompt 3"
    assert "' one' became ' keeper'" in where.detail
    assert "0.01 nats" in where.detail
    assert (helped.short, helped.tone) == ("No measurable difference", "neutral")
    assert "+9.4 pp [-1.2 pp, +20 pp]" in helped.detail


def test_identical_tokens_are_said_so(whole: Analysis) -> None:
    same, where, _ = _analysis.view(with_recommendation(whole, baseline="float16")).answers
    assert (same.short, same.tone) == ("Yes, all of them", "good")
    assert (where.short, where.tone) == ("Nowhere", "good")


@pytest.mark.parametrize(
    ("metric", "estimate", "short", "tone"),
    [
        ("match_ratio", 0.1, "Yes", "good"),
        ("match_ratio", -0.1, "No, it is worse", "bad"),
        ("rel_l2", -0.1, "Yes", "good"),
        ("rel_l2", 0.1, "No, it is worse", "bad"),
        ("something", 0.1, "It differs", "neutral"),
    ],
)
def test_direction_of_the_metric_decides(whole: Analysis, metric: str, estimate: float, short: str, tone: str) -> None:
    low, high = sorted((estimate * 0.5, estimate * 1.5))
    changed = with_recommendation(whole, metric=metric, estimate=estimate, low=low, high=high, measurable=True)
    answer = _analysis.view(changed).answers[2]
    assert (answer.short, answer.tone) == (short, tone)


def test_only_ratios_are_shown_in_points(whole: Analysis) -> None:
    for metric, text in (
        ("clamp rate", "+9.4 pp"),
        ("match_ratio", "+9.4 pp"),
        ("rel_l2 of generated rows", "+0.0938"),
    ):
        assert text in _analysis.view(with_recommendation(whole, metric=metric)).answers[2].detail


def test_interval_marks_lie_in_order_around_zero(whole: Analysis) -> None:
    mark = _analysis.view(whole).interval
    assert mark is not None
    assert 0 <= mark.low < mark.zero < mark.estimate < mark.high <= 100
    assert (mark.worse, mark.better) == ("worse", "better")
    assert _analysis.view(with_recommendation(whole, high=math.inf)).interval is None


def test_config_lines(whole: Analysis) -> None:
    reference, bf16, _, float16 = _analysis.view(whole).configs
    assert reference.is_reference
    assert reference.rel_l2 == ("-", "-")
    assert (bf16.match, bf16.identical, bf16.first, bf16.significant_drift) == ("58.7 %", "1 of 4", "8", True)
    assert float16.first == "none"
    assert float16.rel_l2[1] == "inf"
    assert sum(share for _, share, _ in bf16.bands) == pytest.approx(100)
    cells = [cell for cell in whole.drift if cell.config == "bf16"]
    assert bf16.bands[1][1] == pytest.approx(100 * sum(cell.band == "0.01-0.1" for cell in cells) / len(cells))


def test_prompts_that_diverge_come_first(whole: Analysis) -> None:
    lines = _analysis.view(whole).prompts
    assert [line.first for line in lines[:5]] == [8, 8, 17, 23, 29]
    assert all(line.first is None for line in lines[5:])


def test_a_run_that_stopped_early_shows_its_end(whole: Analysis) -> None:
    pair = whole.agreements[0]
    stopped = dataclasses.replace(pair, tokens=pair.tokens[:3], ids=pair.ids[:3], first_divergence=3)
    line = _analysis.view(dataclasses.replace(whole, agreements=(stopped,))).prompts[0]
    assert line.token == "(end)"
    assert line.reference_token == pair.reference_tokens[3]


def test_rows_left_out_are_counted(whole: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_analysis, "MAX_ROWS", 5)
    view = _analysis.view(whole)
    assert (len(view.prompts), view.prompts_left_out) == (5, 7)


def test_a_reference_alone_has_no_answers() -> None:
    view = _analysis.view(factory.bare())
    assert view.headline == "nothing was compared: the run holds only its reference"
    assert view.answers == ()
    assert view.interval is None


def test_comparison_answers(pairs: Comparison) -> None:
    agree, where, complete = _comparison.view(pairs).answers
    assert agree[1] == "18 of 24 pairs pass"
    assert "5 failed" in agree[2]
    assert where[1] == "layers.3.resid_post"
    assert complete[1] == "No"


def test_nothing_compared_is_not_good(pairs: Comparison) -> None:
    empty = dataclasses.replace(pairs, records=(), first_divergence=None)
    assert _comparison.view(empty).answers[0][1:] == ("Nothing was compared", "no pair", "bad")


def test_failing_pairs_come_first_and_waived_ones_do_not(pairs: Comparison) -> None:
    lines = _comparison.view(pairs).verdicts
    assert [line.status for line in lines[:6]] == ["failed"] * 5 + ["corrupt"]
    waived = next(line for line in lines if line.waived)
    assert (waived.status, waived.waived) == ("inconclusive", "layers.5.*")
    assert lines.index(waived) > 5
    assert lines[3].cosine == "nan"


def test_divergence_carries_the_fingerprints_of_its_pair(pairs: Comparison) -> None:
    divergence = _comparison.view(pairs).divergence
    assert divergence is not None
    assert divergence.fingerprints[0][:2] == ("scale", "candidate = 1.018 * reference")
    assert ("reference", "1.25") in divergence.facts


def test_ledger_shows_only_groups_that_are_short(pairs: Comparison) -> None:
    assert [group[:2] for group in _comparison.view(pairs).groups] == [("site", "layers.7.resid_post")]


def test_chart_is_logarithmic_and_marks_the_first_divergence(pairs: Comparison) -> None:
    chart = _comparison.view(pairs).chart
    assert chart is not None
    heights = {label: y for y, label in chart.ticks}
    assert heights["0.01"] - heights["0.1"] == pytest.approx(heights["0.001"] - heights["0.01"], abs=0.02)
    failed = [point for point in chart.points if point.status == "failed"]
    assert chart.mark == failed[0].x
    assert all(0 <= point.y <= 200 and 0 <= point.x <= 800 for point in chart.points)
    assert _comparison.view(dataclasses.replace(pairs, records=pairs.records[:2])).chart is None
