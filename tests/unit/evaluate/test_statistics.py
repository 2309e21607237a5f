"""Statistics of an evaluation, against what can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.errors import InputError
from trimtab.evaluate import statistics
from trimtab.evaluate.scorers.held_out import classifier_report, split_questions


def test_intervals_resample_prompts_and_not_outputs() -> None:
    """Twenty outputs of one prompt are not twenty observations."""
    generator = np.random.default_rng(0)
    offsets = generator.normal(0, 1, 8)
    values = [float(offset + noise) for offset in offsets for noise in generator.normal(0, 0.01, 20)]
    prompts = [prompt for prompt in range(8) for _ in range(20)]
    found = statistics.mean_over_prompts(values, prompts, seed=0)
    assert found.value == pytest.approx(np.mean(values))
    width = found.high - found.low
    assert 0.6 < width / (2 * 1.96 * offsets.std() / math.sqrt(8)) < 1.4
    assert statistics.mean_over_prompts(values, list(range(160)), seed=0).high < found.high
    alone = statistics.mean_over_prompts([1.0, 2.0], [3, 3], seed=0)
    assert alone.value == 1.5 and math.isnan(alone.low) and math.isnan(alone.high)
    assert math.isnan(statistics.mean_over_prompts([], [], seed=0).value)


def test_dose_response_of_a_planted_slope() -> None:
    generator = np.random.default_rng(1)
    rows = [(scale, prompt) for prompt in range(10) for scale in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    values = [2.0 * scale + float(generator.normal(0, 0.2)) for scale, _ in rows]
    found = statistics.dose_response([scale for scale, _ in rows], values, [prompt for _, prompt in rows], seed=0)
    assert found.slope_low < 2.0 < found.slope_high and found.slope_high - found.slope_low < 0.4
    assert found.spearman > 0.9 and found.n == 50 and not found.reason
    assert [point.scale for point in found.points] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert all(point.count == 10 and point.low <= point.mean <= point.high for point in found.points)


def test_a_constant_series_has_a_reason_and_no_nan() -> None:
    flat = statistics.dose_response([-1.0, 0.0, 1.0, 1.0], [0.5] * 4, [0, 0, 1, 1])
    assert flat.spearman == 0.0 and flat.reason == "every score is the same" and flat.slope == 0.0
    one = statistics.dose_response([1.0, 1.0], [0.1, 0.9], [0, 1])
    assert one.spearman == 0.0 and one.reason == "every strength is the same" and one.slope == 0.0
    assert statistics.spearman([1.0], [1.0]) == (0.0, "1 outputs: a correlation needs at least two")


def test_pareto() -> None:
    points = [("a", 1.0, 1.0), ("b", 2.0, 1.5), ("c", 1.5, 1.6), ("d", 1.0, 1.0), ("e", math.nan, 1.0)]
    assert {one.variant for one in statistics.pareto(points) if one.efficient} == {"a", "b", "d"}


def test_split_half_of_noise_gains_nothing_where_the_choosing_half_does() -> None:
    noise = np.random.default_rng(2).normal(0, 1, (8, 24))
    found = statistics.split_half([float(scale) for scale in range(1, 9)], noise, seed=0)
    assert found.selected > 0.25 and found.held_out < 0.1
    assert found.held_out < found.selected - 0.2


def test_split_half_keeps_to_the_budget() -> None:
    gain = np.repeat([[1.0], [2.0], [3.0]], 6, axis=1)
    harm = np.repeat([[0.0], [0.1], [0.5]], 6, axis=1)
    found = statistics.split_half([0.1, 0.2, 0.3], gain, harm, budget=0.2)
    assert (found.chosen, found.stability, found.selected, found.held_out) == (0.2, 1.0, 2.0, 2.0)
    none = statistics.split_half([0.1, 0.2, 0.3], gain, harm, budget=-1.0)
    assert math.isnan(none.chosen) and none.undecided == none.splits == 400
    with pytest.raises(InputError, match="at least two prompts"):
        statistics.split_half([0.1], [[1.0]])


def test_auc() -> None:
    assert statistics.auc([0.1, 0.2, 0.3, 0.4], [False, False, True, True]) == 1.0
    assert statistics.auc([1.0, 1.0, 1.0], [False, True, True]) == 0.5
    assert statistics.auc([3.0, 1.0, 2.0], [False, True, False]) == 0.0
    with pytest.raises(InputError, match="all 2 labels are positive"):
        statistics.auc([1.0, 2.0], [True, True])


def test_no_question_is_on_both_sides() -> None:
    """240 questions recur under five system prompts: a split by row would put each on both sides."""
    questions = [f"question {index % 24}" for index in range(120)]
    labels = [index % 5 < 2 for index in range(120)]
    for seed in range(20):
        train, test = split_questions(labels, questions, held_out=0.25, seed=seed)
        assert sorted(train + test) == list(range(120))
        assert not {questions[row] for row in train} & {questions[row] for row in test}
        assert {labels[row] for row in train} == {labels[row] for row in test} == {True, False}
    rare = [index < 2 for index in range(6)]  # both classes on both sides, although most splits leave one out
    train, test = split_questions(rare, range(6), held_out=0.34, seed=0)
    assert any(rare[row] for row in train) and any(rare[row] for row in test)
    with pytest.raises(InputError, match="of one class"):
        split_questions([True, True], [0, 1], held_out=0.5, seed=0)
    with pytest.raises(InputError, match="more questions were expected"):
        split_questions([True, False], [0, 0], held_out=0.5, seed=0)


def test_the_report_of_a_classifier() -> None:
    scores, labels = [0.9, 0.8, 0.4, 0.3, 0.6, 0.1], [True, True, True, False, False, False]
    found = classifier_report("c", scores, labels, [0, 1, 2, 0, 1, 2], threshold=0.5, train=4, seed=0)
    assert found.accuracy == pytest.approx(4 / 6) and found.f1 == pytest.approx(2 / 3)
    assert found.auc == pytest.approx(8 / 9) and found.auc_low <= found.auc <= found.auc_high
    assert (found.train, found.held_out, found.questions) == (4, 6, 3)
