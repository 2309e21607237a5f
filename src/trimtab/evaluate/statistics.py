"""Statistics of an evaluation: intervals over prompts, dose-response, Pareto, the choice of a strength.

Outputs to one prompt are not independent, so prompts are what is resampled. Everything is seeded, and no figure is NaN
without a reason beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trimtab.errors import InputError
from trimtab.results.evaluation import DosePoint, DoseResponse, ParetoPoint, SplitHalf
from trimtab.stats import rank_correlation

Floats = np.ndarray[Any, np.dtype[np.float64]]
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A figure with its 95 % interval; the ends are NaN when fewer than two prompts were seen."""

    value: float
    low: float
    high: float


def mean_over_prompts(values: Sequence[float], prompts: Sequence[int], *, seed: int) -> Estimate:
    """Return the mean over outputs with its interval: percentiles over resampled prompts.

    Args:
        values: one per output, finite.
        prompts: the prompt of each output.
        seed: of the resampling.
    """
    y, groups = _columns(values, prompts)
    if not y.size:
        return Estimate(math.nan, math.nan, math.nan)
    sums = _sums([np.ones_like(y), y], groups)
    drawn = _resampled(sums, seed)
    return _estimate(float(y.mean()), drawn[:, 1] / drawn[:, 0] if drawn.size else drawn[:, 0])


def slope_over_prompts(x: Sequence[float], y: Sequence[float], prompts: Sequence[int], *, seed: int) -> Estimate:
    """Return the least-squares slope of y on x, its interval over resampled prompts; 0 for a constant x."""
    ys, groups = _columns(y, prompts)
    xs = np.asarray(x, dtype=np.float64)
    if xs.shape != ys.shape:
        raise InputError(f"got {xs.size} strengths and {ys.size} values; expected as many of each")
    if not xs.size:
        return Estimate(math.nan, math.nan, math.nan)
    xs = xs - xs.mean()
    columns = [np.ones_like(xs), xs, ys, xs * xs, xs * ys]
    sums = _sums(columns, groups)
    return _estimate(float(_slope(sums.sum(axis=0)[None])[0]), _slope(_resampled(sums, seed)))


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, str]:
    """Return the rank correlation over single outputs, and "" or the reason why it is undefined and given as 0."""
    if len(x) < 2:
        return 0.0, f"{len(x)} outputs: a correlation needs at least two"
    found = rank_correlation(x, y)
    if found.undefined:
        names = {
            "constant first series": "every strength is the same",
            "constant second series": "every score is the same",
        }
        return 0.0, names.get(found.undefined, "every strength and every score is the same")
    return found.value, ""


def dose_response(
    scales: Sequence[float],
    values: Sequence[float],
    prompts: Sequence[int],
    *,
    group: str = "",
    scorer: str = "",
    unit: str = "",
    seed: int = 0,
) -> DoseResponse:
    """Return how a score moves with the strength.

    Args:
        scales: strength of each output; 0 is unsteered.
        values: score of each output, finite.
        prompts: prompt of each output.
        group: name of the vector.
        scorer: name of the score.
        unit: of the strengths.
        seed: of the intervals.
    """
    points = []
    for scale in sorted(set(scales)):
        rows = [index for index, one in enumerate(scales) if one == scale]
        found = mean_over_prompts([values[i] for i in rows], [prompts[i] for i in rows], seed=seed)
        points.append(DosePoint(scale=scale, mean=found.value, low=found.low, high=found.high, count=len(rows)))
    slope = slope_over_prompts(scales, values, prompts, seed=seed)
    rho, reason = spearman(scales, values)
    return DoseResponse(
        group=group,
        scorer=scorer,
        unit=unit,
        points=tuple(points),
        slope=slope.value,
        slope_low=slope.low,
        slope_high=slope.high,
        spearman=rho,
        reason=reason,
        n=len(values),
    )


def pareto(points: Sequence[tuple[str, float, float]], *, scorer: str = "") -> tuple[ParetoPoint, ...]:
    """Mark the variants that no other beats: as much effect for as little damage, and better in one.

    Args:
        points: (variant, effect, damage); a point with a NaN is never efficient and beats none.
        scorer: name of the effect.
    """

    def beats(one: tuple[str, float, float], other: tuple[str, float, float]) -> bool:
        return one[1] >= other[1] and one[2] <= other[2] and (one[1] > other[1] or one[2] < other[2])

    return tuple(
        ParetoPoint(
            variant=one[0],
            scorer=scorer,
            effect=one[1],
            damage=one[2],
            efficient=math.isfinite(one[1])
            and math.isfinite(one[2])
            and not any(beats(other, one) for other in points),
        )
        for one in points
    )


def split_half(
    scales: Sequence[float],
    gains: Sequence[Sequence[float]] | Floats,
    damages: Sequence[Sequence[float]] | Floats | None = None,
    *,
    budget: float = math.inf,
    splits: int = 200,
    seed: int = 0,
    group: str = "",
    scorer: str = "",
) -> SplitHalf:
    """Choose the strength on one half of the prompts and score it on the other, both ways, many times.

    Args:
        scales: the strengths.
        gains: [scale, prompt], gain over unsteered.
        damages: [scale, prompt], averaged over the half that chooses; None: nothing is too much.
        budget: a strength whose mean damage is above it cannot be chosen.
        splits: random halvings; each gives two choices.
        seed: of the halvings.
        group: name of the vector.
        scorer: name of the gain.

    Raises:
        InputError: shapes that do not fit, or fewer than two prompts.
    """
    gain = np.asarray(gains, dtype=np.float64)
    if gain.ndim != 2 or gain.shape[0] != len(scales) or gain.shape[1] < 2:
        raise InputError(f"gains of shape {gain.shape}; expected [{len(scales)}, prompts] with at least two prompts")
    harm = np.zeros_like(gain) if damages is None else np.asarray(damages, dtype=np.float64)
    if harm.shape != gain.shape:
        raise InputError(f"damages of shape {harm.shape}; expected that of the gains, {gain.shape}")
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    selected: list[float] = []
    held_out: list[float] = []
    half = gain.shape[1] // 2
    for _ in range(splits):
        order = generator.permutation(gain.shape[1])
        for chooses, judges in ((order[:half], order[half:]), (order[half:], order[:half])):
            allowed = np.flatnonzero(harm[:, chooses].mean(axis=1) <= budget)
            if not allowed.size:
                continue
            means = gain[:, chooses].mean(axis=1)
            best = int(allowed[np.argmax(means[allowed])])
            chosen.append(best)
            selected.append(float(means[best]))
            held_out.append(float(gain[best, judges].mean()))
    most = max(set(chosen), key=lambda one: (chosen.count(one), -one)) if chosen else None
    low, high = np.quantile(held_out, [0.025, 0.975]) if held_out else (math.nan, math.nan)
    return SplitHalf(
        group=group,
        scorer=scorer,
        chosen=math.nan if most is None else scales[most],
        stability=0.0 if most is None else chosen.count(most) / len(chosen),
        selected=float(np.mean(selected)) if selected else math.nan,
        held_out=float(np.mean(held_out)) if held_out else math.nan,
        low=float(low),
        high=float(high),
        splits=2 * splits,
        undecided=2 * splits - len(chosen),
    )


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the area under the ROC curve: P(positive scores above negative), ties half. 0.5 is chance.

    Raises:
        InputError: the labels are of one class.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if x.shape != y.shape or not np.isfinite(x).all():
        raise InputError(f"got {x.size} scores and {y.size} labels; as many finite scores as labels were expected")
    positive = int(y.sum())
    if positive in (0, y.size):
        raise InputError(
            f"all {y.size} labels are {'positive' if positive else 'negative'}; both classes were expected"
        )
    from scipy.stats import rankdata

    ranks = rankdata(x)[y].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * (y.size - positive)))


def _columns(values: Sequence[float], prompts: Sequence[int]) -> tuple[Floats, np.ndarray[Any, Any]]:
    y = np.asarray(values, dtype=np.float64)
    if y.ndim != 1 or len(prompts) != y.size or not np.isfinite(y).all():
        raise InputError(f"got {y.size} values for {len(prompts)} prompts; expected one finite value and prompt each")
    return y, np.unique(np.asarray(prompts), return_inverse=True)[1]


def _sums(columns: Sequence[Floats], groups: np.ndarray[Any, Any]) -> Floats:
    """Sums of each column per prompt, [prompt, column]."""
    return np.stack([np.bincount(groups, weights=column) for column in columns], axis=1)


def _resampled(sums: Floats, seed: int) -> Floats:
    """The sums over resampled prompts, [resample, column]; none when there is but one prompt."""
    count = len(sums)
    if count < 2:
        return np.zeros((0, sums.shape[1]))
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.asarray(weights @ sums, dtype=np.float64)


def _slope(sums: Floats) -> Floats:
    n, x, y, xx, xy = sums.T
    spread = xx - x * x / n
    flat = spread <= 1e-12 * np.maximum(xx, 1e-300)
    return np.where(flat, 0.0, (xy - x * y / n) / np.where(flat, 1.0, spread))


def _estimate(value: float, drawn: Floats) -> Estimate:
    if not drawn.size:
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
