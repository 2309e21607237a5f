"""Statistics of experiments: bootstrap intervals, tests and rank correlations with their corner cases decided.

scipy does the distributions; what it answers with a warning or NaN (constant data, identical samples) has one defined
answer here. Inputs are sequences of finite numbers; anything else is an `InputError`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trimtab.errors import InputError

Floats = np.ndarray[Any, np.dtype[np.float64]]
Numbers = Sequence[float] | np.ndarray[Any, Any]

_BATCH = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float
    n: int
    """Observations (pairs, for a paired estimate)."""

    @property
    def holds_zero(self) -> bool:
        """True when zero lies inside: no measurable difference."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class TestResult:
    """A test statistic and its two-sided p-value."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    statistic: float
    p_value: float
    n: int
    """Observations on both sides together (pairs, for a correlation)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Correlation:
    """A rank correlation; undefined (NaN) when a series is constant."""

    value: float
    """Between -1 and 1; NaN when undefined."""
    p_value: float
    n: int
    undefined: str = ""
    """Why there is no value: "constant first series", "constant second series", "constant series"; empty otherwise."""


def bootstrap_mean(values: Numbers, *, seed: int, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """Return the mean with its BCa bootstrap interval.

    Bias-corrected and accelerated (Efron, Better bootstrap confidence intervals, JASA 1987): the interval's ends are
    the quantiles `Phi(z0 + (z0 + z) / (1 - a (z0 + z)))` of the resampled means, z0 from the share of them below the
    estimate (ties half), and for a mean `a = sum (x - mean)^3 / (6 (sum (x - mean)^2)^1.5)`. Constant data, and a
    single observation, give an interval of no width.

    Args:
        values: observations.
        seed: of numpy's PCG64; the same seed gives the same interval.
        resamples: bootstrap samples.
        confidence: coverage asked for, between 0 and 1.

    Raises:
        InputError: for no observation, a non-finite one, or options out of range.
    """
    x = _finite(values, "values")
    if not (0.0 < confidence < 1.0) or resamples < 1:
        raise InputError(f"got confidence={confidence}, resamples={resamples}; expected (0, 1) and at least 1")
    estimate = float(x.mean())
    size = _exponent(x - estimate)
    centred = np.ldexp(x - estimate, -size)
    spread = float(np.sum(centred**2))
    if np.all(x == x[0]) or spread == 0.0:
        return Interval(estimate=estimate, low=estimate, high=estimate, n=x.size)
    from scipy.special import ndtr, ndtri

    shifts = _resampled_means(centred, seed, resamples)
    means = estimate + np.ldexp(shifts, size)
    share = float(np.mean(means < estimate) + np.mean(means == estimate) / 2)
    bias = float(ndtri(min(max(share, 0.5 / resamples), 1 - 0.5 / resamples)))
    skew = float(np.sum(centred**3)) / (6.0 * spread**1.5)
    z = ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2])) + bias
    low, high = np.quantile(means, ndtr(bias + z / (1 - skew * z)))
    return Interval(estimate=estimate, low=float(low), high=float(high), n=x.size)


def paired_bootstrap(a: Numbers, b: Numbers, *, seed: int, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """Return the mean of the paired differences `a - b` with its BCa bootstrap interval; pairs are resampled.

    Arguments and method as in `bootstrap_mean`.

    Raises:
        InputError: also when the two series differ in length.
    """
    x, y = _pair(a, b)
    return bootstrap_mean(x - y, seed=seed, resamples=resamples, confidence=confidence)


def welch_t(a: Numbers, b: Numbers) -> TestResult:
    """Test whether two samples of unequal variance have one mean: `t = (mean a - mean b) / sqrt(va/na + vb/nb)`.

    Welch, Biometrika 34, 1947; v the unbiased variances, degrees of freedom by Welch and Satterthwaite. Two constant
    samples give t = 0, p = 1 when equal and t = +-inf, p = 0 when not.

    Raises:
        InputError: when a sample has fewer than two observations, or a non-finite one.
    """
    x, y = _finite(a, "a", least=2), _finite(b, "b", least=2)
    n = x.size + y.size
    if np.all(x == x[0]) and np.all(y == y[0]):
        gap = float(x[0] - y[0])
        return TestResult(statistic=math.copysign(math.inf, gap) if gap else 0.0, p_value=0.0 if gap else 1.0, n=n)
    from scipy.special import stdtr

    size = _exponent(np.concatenate([x, y]))
    x, y = np.ldexp(x, -size), np.ldexp(y, -size)
    gap, deviations = float(x.mean() - y.mean()), [x - x.mean(), y - y.mean()]
    spread = _exponent(np.concatenate(deviations))
    shares = np.array([float(np.sum(np.ldexp(one, -spread) ** 2)) / (one.size - 1) / one.size for one in deviations])
    total = float(shares.sum())
    freedom = total**2 / float(shares[0] ** 2 / (x.size - 1) + shares[1] ** 2 / (y.size - 1))
    with np.errstate(over="ignore"):
        statistic = float(np.ldexp(gap, -spread)) / math.sqrt(total)
    return TestResult(statistic=statistic, p_value=float(2 * stdtr(freedom, -abs(statistic))), n=n)


def fdr_bh(p_values: Numbers) -> Floats:
    """Return p-values adjusted for the false discovery rate: `min over j >= i of (m p_(j) / j)`, at most 1.

    Benjamini and Hochberg, J. R. Stat. Soc. B 57, 1995. Rejecting where the result is <= alpha keeps the expected
    share of false rejections below alpha. The order of the input is kept; no p-values give none.

    Raises:
        InputError: for values outside [0, 1].
    """
    p = _finite(p_values, "p_values", least=0)
    if p.size == 0:
        return p
    if p.min() < 0 or p.max() > 1:
        raise InputError(f"got p-values between {p.min()} and {p.max()}; expected numbers in [0, 1]")
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p), dtype=np.float64)


def ks(a: Numbers, b: Numbers) -> TestResult:
    """Test whether two samples come from one distribution (Kolmogorov and Smirnov): `D = max |F_a - F_b|`.

    D lies between 0 and 1; 0 means equal empirical distributions. The p-value is exact for small samples, asymptotic
    for large ones (scipy's rule).
    """
    x, y = _finite(a, "a"), _finite(b, "b")
    from scipy.stats import ks_2samp

    method = "exact" if max(x.size, y.size) <= 1000 else "asymp"
    result = ks_2samp(x, y, method=method)
    return TestResult(statistic=float(result.statistic), p_value=float(result.pvalue), n=x.size + y.size)


def rank_correlation(a: Numbers, b: Numbers, *, method: Literal["spearman", "kendall"] = "spearman") -> Correlation:
    """Return Spearman's rho (Pearson's correlation of the ranks, ties averaged) or Kendall's tau-b.

    A constant series has no ranks to correlate: the value and p are NaN and `undefined` says which series it was.

    Raises:
        InputError: for series of different length, fewer than two pairs, or an unknown method.
    """
    x, y = _pair(a, b, least=2)
    if method not in ("spearman", "kendall"):
        raise InputError(f"got method={method!r}; expected 'spearman' or 'kendall'")
    flat_x, flat_y = bool(np.all(x == x[0])), bool(np.all(y == y[0]))
    if flat_x or flat_y:
        which = "constant series" if flat_x and flat_y else f"constant {'first' if flat_x else 'second'} series"
        return Correlation(value=math.nan, p_value=math.nan, n=x.size, undefined=which)
    from scipy import stats

    if method == "kendall":
        result = stats.kendalltau(x, y)
        return Correlation(value=float(result.statistic), p_value=float(result.pvalue), n=x.size)
    if x.size == 2:  # rho is +-1 and no test is possible
        return Correlation(value=float(np.sign((x[1] - x[0]) * (y[1] - y[0]))), p_value=1.0, n=2)
    result = stats.spearmanr(x, y)
    return Correlation(value=float(result.statistic), p_value=float(result.pvalue), n=x.size)


def _exponent(x: Floats) -> int:
    """Power of two above the largest magnitude; scaled by it, squares neither overflow nor all underflow."""
    return int(np.frexp(np.abs(x).max())[1])


def _resampled_means(x: Floats, seed: int, resamples: int) -> Floats:
    """Means of samples with replacement, in batches of bounded memory."""
    generator = np.random.default_rng(seed)
    batch = max(1, _BATCH // x.size)
    means = [
        x[generator.integers(0, x.size, (min(batch, resamples - start), x.size))].mean(axis=1)
        for start in range(0, resamples, batch)
    ]
    return np.concatenate(means)


def _finite(values: Numbers, name: str, *, least: int = 1) -> Floats:
    """One-dimensional finite float64 data, or an `InputError`."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size < least:
        raise InputError(f"got {name} of shape {x.shape}; expected one dimension with at least {least} numbers")
    if not np.all(np.isfinite(x)):
        at = int(np.flatnonzero(~np.isfinite(x))[0])
        raise InputError(f"{name}[{at}] is {x[at]}; expected finite numbers (drop or replace it first)")
    return x


def _pair(a: Numbers, b: Numbers, *, least: int = 1) -> tuple[Floats, Floats]:
    """Two series of one length."""
    x, y = _finite(a, "a", least=least), _finite(b, "b", least=least)
    if x.size != y.size:
        raise InputError(f"got {x.size} and {y.size} observations; expected pairs, so equal numbers")
    return x, y
