"""z-scores against controls, with what the controls' own number leaves unknown; groups, focus layers, rankings.

A measurement of directions is compared with the same measurement of the same kind: what one direction does with the
controls taken one by one, what two directions do to each other with pairs of controls. The mean and deviation are of
the controls, so they have sampling errors; a jackknife over the controls (leave one out, with all pairs that it is in)
carries those into every z-score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.errors import InputError
from trimtab.results.weights import GroupTest, RankedComponent
from trimtab.stats import fdr_bh, rank_correlation, welch_t
from trimtab.weights.directions import MIN_CONTROLS

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """Mean and deviation of controls, for any number of measurements at once (leading axes).

    Args:
        mean: [...] of the controls.
        deviation: [...] with n - 1 below the sum (n (n - 1) - 1 for pairs), at least `floor`.
        count: controls.
        slope: [...] jackknife variance of 1 / deviation.
        shift: [...] jackknife variance of mean / deviation.
        both: [...] their covariance.
    """

    mean: Array
    deviation: Array
    count: int
    slope: Array
    shift: Array
    both: Array

    def z(self, values: Array) -> Array:
        """Return `(values - mean) / deviation`, [..., n]; 0 where a value is the mean of controls without spread."""
        gap = values - self.mean[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            scored = gap / self.deviation[..., None]
        return np.asarray(np.where(gap == 0, 0.0, scored))

    def error(self, values: Array) -> Array:
        """Return the standard error of `z(values)` that comes from the number of controls, [..., n]."""
        gap = values - self.mean[..., None]
        with np.errstate(invalid="ignore"):
            spread = gap**2 * self.slope[..., None] - 2 * gap * self.both[..., None] + self.shift[..., None]
        return np.asarray(np.sqrt(np.maximum(spread, 0.0)))


def of_controls(values: Array, *, floor: float | Array = 0.0) -> Baseline:
    """Return the baseline of controls taken one by one.

    Args:
        values: [..., n] of n controls.
        floor: smallest deviation that counts, in the unit of the values: what rounding alone may do.

    Raises:
        InputError: fewer controls than a z-score needs.
    """
    count = _enough(values.shape[-1])
    centre = values.mean(axis=-1)
    gaps = values - centre[..., None]
    first, second = gaps.sum(axis=-1), (gaps**2).sum(axis=-1)
    deviation = _deviation(first, second, count)
    means = (first[..., None] - gaps) / (count - 1)
    deviations = _deviation(first[..., None] - gaps, second[..., None] - gaps**2, count - 1)
    return _baseline(centre, deviation, means, deviations, count, floor)


def of_pairs(values: Array, *, floor: float | Array = 0.0) -> Baseline:
    """Return the baseline of ordered pairs of different controls.

    Args:
        values: [..., n, n] of n controls with each other; the diagonal is not read.
        floor: as in `of_controls`.

    Raises:
        InputError: fewer controls than a z-score needs.
    """
    count = _enough(values.shape[-1])
    off = ~np.eye(count, dtype=bool)
    total = count * (count - 1)
    centre = np.where(off, values, 0.0).sum(axis=(-2, -1)) / total
    gaps = np.where(off, values - centre[..., None, None], 0.0)
    squares = gaps**2
    first, second = gaps.sum(axis=(-2, -1)), squares.sum(axis=(-2, -1))
    deviation = _deviation(first, second, total)
    left = (count - 1) * (count - 2)
    ones = first[..., None] - gaps.sum(axis=-1) - gaps.sum(axis=-2)
    twos = second[..., None] - squares.sum(axis=-1) - squares.sum(axis=-2)
    return _baseline(centre, deviation, ones / left, _deviation(ones, twos, left), count, floor)


def _enough(count: int) -> int:
    if count < MIN_CONTROLS:
        raise InputError(f"{count} controls of the kind compared with; a z-score needs at least {MIN_CONTROLS}")
    return count


def _deviation(first: Array, second: Array, count: int) -> Array:
    return np.asarray(np.sqrt(np.maximum(second - first**2 / count, 0.0) / (count - 1)))


def _baseline(
    centre: Array, deviation: Array, means: Array, deviations: Array, count: int, floor: float | Array
) -> Baseline:
    """Means of the left-out sets are offsets from `centre`."""
    least = np.asarray(floor, dtype=np.float64)
    deviation = np.maximum(deviation, least)
    deviations = np.maximum(deviations, least[..., None])
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.where(deviations > 0, 1 / deviations, 0.0)
    shifts = means * slopes
    slopes = slopes - slopes.mean(axis=-1, keepdims=True)
    shifts = shifts - shifts.mean(axis=-1, keepdims=True)
    share = (count - 1) / count
    return Baseline(
        mean=centre,
        deviation=deviation,
        count=count,
        slope=share * (slopes**2).sum(axis=-1),
        shift=share * (shifts**2).sum(axis=-1),
        both=share * (slopes * shifts).sum(axis=-1),
    )


def compare_groups(
    values: Sequence[float] | Array,
    kinds: Sequence[str],
    *,
    first: str = "role",
    second: str = "trait",
    measure: str = "",
    part: str = "",
    layer: int | None = None,
) -> GroupTest | None:
    """Test whether two kinds of directions have one mean: Welch's t, and Hedges' g as the size of the effect.

    `g = (m1 - m2) / s * (1 - 3 / (4 (n1 + n2) - 9))`, s the pooled deviation (Hedges, J. Educ. Stat. 6, 1981).

    Returns:
        The test, its q-value still its p-value; None when a kind has fewer than two directions.
    """
    every = np.asarray(values, dtype=np.float64)
    a, b = (every[[kind == wanted for kind in kinds]] for wanted in (first, second))
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    found = welch_t(a, b)
    freedom = len(a) + len(b) - 2
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / freedom)
    gap = float(a.mean() - b.mean())
    size = gap / pooled if pooled > 0 else math.copysign(math.inf, gap) if gap else 0.0
    return GroupTest(
        measure=measure,
        part=part,
        layer=layer,
        first=first,
        second=second,
        first_mean=float(a.mean()),
        first_std=float(a.std(ddof=1)),
        first_count=len(a),
        second_mean=float(b.mean()),
        second_std=float(b.std(ddof=1)),
        second_count=len(b),
        t=found.statistic,
        p=found.p_value,
        q=found.p_value,
        effect=size * (1 - 3 / (4 * (freedom + 2) - 9)),
    )


def control_false_discoveries(tests: Sequence[GroupTest]) -> tuple[GroupTest, ...]:
    """Return the tests with q-values (Benjamini and Hochberg) over all of them."""
    adjusted = fdr_bh([one.p for one in tests])
    return tuple(replace(one, q=float(q)) for one, q in zip(tests, adjusted, strict=True))


def beyond(values: Array, controls: Array) -> float:
    """Return how far values exceed what controls do: the mean of `max(0, value - (mean + 2 deviations))`, [n] and [m].

    One direction far out counts as much as many that are a little out; those that controls explain count nothing.
    """
    return float(np.maximum(values - (controls.mean() + 2 * controls.std(ddof=1)), 0.0).mean())


def peak(values: Sequence[float], layers: Sequence[int]) -> tuple[int, float]:
    """Return the layer of the largest value, and the value; the first of equals, NaN never."""
    if not values:
        raise InputError("no layer was measured; give at least one")
    known = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=-np.inf)
    place = int(known.argmax())
    return layers[place], float(values[place])


def rank_components(
    numbers: Sequence[int], variances: Sequence[float | None], effects: Sequence[float], *, measure: str, part: str
) -> tuple[tuple[RankedComponent, ...], float]:
    """Set the effect of each principal component beside the variance that it explains.

    Returns:
        The components in the order of their numbers with their rank by effect, and Spearman's correlation of variance
        with effect (NaN when it is not defined, as for fewer than three).
    """
    order = np.argsort([-value for value in effects], kind="stable")
    ranks = np.empty(len(order), dtype=int)
    ranks[order] = np.arange(1, len(order) + 1)
    rows = sorted(zip(numbers, variances, effects, ranks, strict=True))
    ranked = tuple(
        RankedComponent(measure=measure, part=part, number=number, variance=variance, effect=effect, rank=int(rank))
        for number, variance, effect, rank in rows
    )
    known = [(one.variance, one.effect) for one in ranked if one.variance is not None]
    if len(known) < 3:
        return ranked, math.nan
    return ranked, rank_correlation([one for one, _ in known], [one for _, one in known]).value
