"""Intervals by their coverage, tests against scipy, and what is undefined said so."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from trimtab import stats
from trimtab.errors import InputError


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        found = stats.bootstrap_mean(rng.normal(3.0, 2.0, 40), seed=trial, resamples=400)
        inside += found.low <= 3.0 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_a_paired_interval_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=30) * 10
    after = base + 0.5 + 0.1 * rng.normal(size=30)
    found = stats.paired_bootstrap(after, base, seed=0)
    assert found == stats.bootstrap_mean(after - base, seed=0)
    assert found.low < found.estimate < found.high and found.low > 0 and not found.holds_zero
    assert stats.paired_bootstrap(base, base, seed=0).holds_zero


def test_constant_data_have_no_width_and_bad_data_are_refused() -> None:
    found = stats.bootstrap_mean([2.0, 2.0, 2.0], seed=0)
    assert (found.low, found.estimate, found.high) == (2.0, 2.0, 2.0)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(InputError):
            stats.bootstrap_mean(bad, seed=0)
    with pytest.raises(InputError):
        stats.paired_bootstrap([1.0], [1.0, 2.0], seed=0)


def test_welch_and_kolmogorov_smirnov_are_scipy_s() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=40), rng.normal(0.5, 2, size=25)
    expected = scipy_stats.ttest_ind(a, b, equal_var=False)
    found = stats.welch_t(a, b)
    assert (found.statistic, found.p_value) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
    other = scipy_stats.ks_2samp(a, b)
    assert stats.ks(a, b).p_value == pytest.approx(other.pvalue)
    assert stats.welch_t([1.0, 1.0], [1.0, 1.0]).p_value == 1.0


def test_benjamini_hochberg_by_hand() -> None:
    found = stats.fdr_bh([0.01, 0.04, 0.03, 0.5])
    assert found == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])


def test_a_constant_series_has_no_rank_correlation_and_says_which() -> None:
    found = stats.rank_correlation([1, 1, 1], [1, 2, 3])
    assert math.isnan(found.value) and found.undefined == "constant first series"
    assert stats.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]).value == pytest.approx(1.0)
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=20), rng.normal(size=20)
    for method, reference in (("spearman", scipy_stats.spearmanr), ("kendall", scipy_stats.kendalltau)):
        assert stats.rank_correlation(a, b, method=method).value == pytest.approx(reference(a, b).statistic)


def test_the_interval_of_many_normal_values_is_the_closed_form() -> None:
    x = np.random.default_rng(4).normal(5.0, 3.0, 2000)
    found = stats.bootstrap_mean(x, seed=1, resamples=4000)
    half = 1.959964 * x.std() / math.sqrt(x.size)
    assert found.estimate == pytest.approx(x.mean()) and found.n == 2000
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.06 * half)
    assert found == stats.bootstrap_mean(x, seed=1, resamples=4000) != stats.bootstrap_mean(x, seed=2, resamples=4000)
    narrow = stats.bootstrap_mean(x[:200], seed=1, resamples=40_000, confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.67449 * x[:200].std() / math.sqrt(200), rel=0.03)


def test_the_interval_is_scipy_s_bca_on_skewed_data() -> None:
    x = np.random.default_rng(5).exponential(size=25)
    found = stats.bootstrap_mean(x, seed=0, resamples=8000)
    other = scipy_stats.bootstrap((x,), np.mean, method="BCa", n_resamples=8000, rng=np.random.default_rng(6))
    width = other.confidence_interval.high - other.confidence_interval.low
    expected = (other.confidence_interval.low, other.confidence_interval.high)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.05 * width)


def test_batches_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(7).normal(size=16)
    whole = stats.bootstrap_mean(x, seed=0, resamples=100)
    monkeypatch.setattr(stats, "_BATCH", 50)
    assert stats.bootstrap_mean(x, seed=0, resamples=100) == whole


def test_constant_and_equal_samples_have_one_answer() -> None:
    apart = stats.welch_t([1.0, 1.0], [2.0, 2.0])
    assert (apart.statistic, apart.p_value, apart.n) == (-math.inf, 0.0, 4)
    half = stats.welch_t([1.0, 1.0, 1.0], [2.0, 3.0])
    assert half.statistic == pytest.approx(-3.0) and 0 < half.p_value < 1
    same = stats.ks([1.0, 1.0], [1.0, 1.0])
    assert (same.statistic, same.p_value) == (0.0, 1.0)
    assert stats.ks([0.0] * 5, [1.0] * 5).statistic == 1.0
    with pytest.raises(InputError, match="at least 2"):
        stats.welch_t([1.0], [1.0, 2.0])


def test_benjamini_hochberg_is_monotone_and_at_most_one() -> None:
    assert stats.fdr_bh([0.9, 0.8, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert stats.fdr_bh([0.02]) == pytest.approx([0.02]) and stats.fdr_bh([]).size == 0
    p = np.random.default_rng(8).uniform(size=50)
    by_hand = [min(50 * q / np.sum(p <= q) for q in p[p >= x]) for x in p]
    assert stats.fdr_bh(p) == pytest.approx(by_hand)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        stats.fdr_bh([0.5, 1.5])


def test_rank_correlation_at_its_edges() -> None:
    ties = stats.rank_correlation([1, 1, 2, 3], [1, 2, 2, 3])  # ranks 1.5 1.5 3 4 and 1 2.5 2.5 4
    assert ties.value == pytest.approx(float(np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1]))
    assert stats.rank_correlation([1, 2], [5, 4]).value == -1.0
    assert stats.rank_correlation([1, 2], [3, 3]).undefined == "constant second series"
    assert stats.rank_correlation([1, 1], [3, 3]).undefined == "constant series"
    with pytest.raises(InputError, match="pearson"):
        stats.rank_correlation([1, 2], [3, 4], method="pearson")  # type: ignore[arg-type]
