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
