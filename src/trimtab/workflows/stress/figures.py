"""The figures of the scaling test: what one series of single outputs says of a vector.

Ours is `se = 0.5 (rho(delta, strength) + rho(judge, strength)) x coherence`, rho Spearman's. The published one has
`pearson(delta, judge)` for its second term: two scorers that look at one text agree whatever the steering does, so a
vector without any effect gets 0.44 where they agree as well as 0.88.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.errors import InputError
from trimtab.results.stress import Effectiveness

Floats = np.ndarray[Any, np.dtype[np.float64]]
Booleans = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """Single outputs of one vector, as a full grid: every strength of every prompt and seed.

    Args:
        strength: [strengths].
        delta: [strengths, prompts, seeds], finite.
        judge: likewise; NaN where the judge gave no value.
        coherent: likewise.
    """

    strength: Floats
    delta: Floats
    judge: Floats
    coherent: Booleans

    def __post_init__(self) -> None:
        shape = self.delta.shape
        if len(shape) != 3 or shape != self.judge.shape or shape != self.coherent.shape or 0 in shape:
            raise InputError(
                f"delta is {shape}, judge {self.judge.shape}, coherent {self.coherent.shape}; one shape, "
                "[strengths, prompts, seeds] and not empty, was expected"
            )
        if self.strength.shape != shape[:1] or not np.isfinite(self.strength).all():
            raise InputError(
                f"{self.strength.shape} strengths for {shape[0]} rows; one finite number each was expected"
            )
        if not np.isfinite(self.delta).all():
            raise InputError("delta has values that are not finite; a delta for every output was expected")

    def first(self, seeds: int) -> Series:
        """Return the outputs of the first seeds."""
        cut = {name: getattr(self, name)[:, :, :seeds] for name in ("delta", "judge", "coherent")}
        return replace(self, **cut)


def effectiveness(series: Series) -> Effectiveness:
    """Return the figures over all outputs of a series; a constant series counts as 0, with the reason."""
    strength = np.broadcast_to(series.strength[:, None, None], series.delta.shape).ravel()
    delta, judge = series.delta.ravel(), series.judge.ravel()
    known = np.isfinite(judge)
    reasons = [
        f"{name}: {why}, counted as 0"
        for name, why in (
            ("spearman(delta, strength)", _why(delta, strength, "delta", "strength")),
            ("spearman(judge, strength)", _why(judge[known], strength[known], "judge", "strength")),
            ("pearson(delta, judge)", _why(delta[known], judge[known], "delta", "judge")),
        )
        if why
    ]
    rho_delta = float(_pearson(_ranks(delta[None]), _ranks(strength[None]))[0])
    rho_judge = float(_pearson(_ranks(judge[known][None]), _ranks(strength[known][None]))[0])
    agreement = float(_pearson(delta[known][None], judge[known][None])[0])
    coherence = float(series.coherent.mean())
    centred = strength - strength.mean()
    spread = float(centred @ centred)
    return Effectiveness(
        se=0.5 * (rho_delta + rho_judge) * coherence,
        published=0.5 * (rho_delta + agreement) * coherence,
        rho_delta=rho_delta,
        rho_judge=rho_judge,
        coherence=coherence,
        n=delta.size,
        judged=int(known.sum()),
        slope=float(centred @ delta) / spread if spread else 0.0,
        reasons=tuple(reasons),
    )


def resampled(series: Series, prompts: np.ndarray[Any, Any], seeds: np.ndarray[Any, Any]) -> Floats:
    """Return se of resampled series, float64 [draws].

    Args:
        series: what to draw from.
        prompts: [draws, prompts], indices with replacement.
        seeds: [draws, seeds], likewise: every drawn prompt is crossed with every drawn seed.
    """
    found = np.empty(len(prompts))
    batch = max(1, (1 << 20) // series.delta.size)
    for start in range(0, len(prompts), batch):
        rows, columns = prompts[start : start + batch, :, None], seeds[start : start + batch, None, :]
        picked: list[Floats] = [
            np.asarray(np.moveaxis(one[:, rows, columns], 0, 1), dtype=np.float64).reshape(len(rows), -1)
            for one in (series.delta, series.judge, series.coherent)
        ]
        delta, judge, coherent = picked
        strength = np.repeat(series.strength, delta.shape[1] // len(series.strength))[None]
        rho_delta = _pearson(_ranks(delta), _ranks(strength))
        if np.isnan(judge).any():
            rho_judge = np.array([_known_rho(one, strength[0]) for one in judge])
        else:
            rho_judge = _pearson(_ranks(judge), _ranks(strength))
        found[start : start + batch] = 0.5 * (rho_delta + rho_judge) * coherent.mean(axis=1)
    return found


def f1(scores: Sequence[float] | Floats, labels: Sequence[bool] | Booleans, threshold: float = 0.0) -> float:
    """Return F1 of `score > threshold`: `2 tp / (2 tp + fp + fn)`; 0 when nothing is found and nothing was there."""
    said, true = np.asarray(scores) > threshold, np.asarray(labels, dtype=bool)
    hits = int((said & true).sum())
    wrong = int((said != true).sum())
    return 2 * hits / (2 * hits + wrong) if hits or wrong else 0.0


def _known_rho(judge: Floats, strength: Floats) -> float:
    known = np.isfinite(judge)
    return float(_pearson(_ranks(judge[known][None]), _ranks(strength[known][None]))[0])


def _why(x: Floats, y: Floats, first: str, second: str) -> str:
    if x.size < 2:
        return "fewer than two outputs have values"
    flat = [name for name, one in ((first, x), (second, y)) if np.all(one == one[0])]
    return f"{' and '.join(flat)} constant" if flat else ""


def _ranks(x: Floats) -> Floats:
    """Ranks along the last axis, ties averaged."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(x, axis=-1), dtype=np.float64) if x.size else x


def _pearson(x: Floats, y: Floats) -> Floats:
    """Correlation of rows [draws, n]; 0 where a row is constant or has fewer than two numbers."""
    if x.shape[-1] < 2:
        return np.zeros(len(x))
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    flat = (np.ptp(x, axis=-1) == 0) | (np.ptp(y, axis=-1) == 0)
    size = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.where(flat, 0.0, (x * y).sum(axis=-1) / np.where(size == 0, 1.0, size))
