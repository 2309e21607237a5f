"""Means over layers: of every measure of one direction, and of every effect of one direction on another."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl
from torch import Tensor

from trimtab.weights._rows import Change, Cross
from trimtab.weights.directions import DirectionSet

_SIDES = ("base", "tuned", "delta")
_SHARES = ("angle", "angular", "cosine_distance", "relative_change", "norm_ratio", "excess")
"""Measures without a unit, which rounding disturbs by units of rounding."""

Key = tuple[str, str, int]
"""(part, measure, sign)."""


def whole_measures(rows: pl.DataFrame) -> dict[Key, pl.DataFrame]:
    """Return key -> a row a direction in their order, all heads together, pairs left out."""
    single = rows.filter(pl.col("head").is_null() & pl.col("other").is_null())
    parts = single.partition_by("part", "measure", "sign", as_dict=True, maintain_order=True)
    return {(str(part), str(measure), int(sign)): frame for (part, measure, sign), frame in parts.items()}


def mean_changes(layers: Iterable[pl.DataFrame], directions: DirectionSet) -> list[Change]:
    """Return the mean of every whole measure over the layers that have it."""
    sums: dict[Key, dict[str, Tensor]] = {}
    counts: dict[Key, int] = {}
    for rows in layers:
        for key, frame in whole_measures(rows).items():
            assert len(frame) == len(directions)
            columns = {side: frame[side].to_torch() for side in _SIDES if frame[side].null_count() == 0}
            held = sums.setdefault(key, {})
            for side, one in columns.items():
                held[side] = held[side] + one if side in held else one.clone()
            counts[key] = counts.get(key, 0) + 1
    means = {key: {side: one / counts[key] for side, one in held.items()} for key, held in sums.items()}
    return [
        Change(
            part=key[0],
            measure=key[1],
            sign=key[2],
            delta=held["delta"],
            base=held.get("base"),
            tuned=held.get("tuned"),
            scale=_scale(key, means),
        )
        for key, held in means.items()
    ]


def _scale(key: Key, means: dict[Key, dict[str, Tensor]]) -> float:
    """Size of what a measure is a difference of: 1 for shares, the length of what is written, or the measure's own."""
    part, measure, _ = key
    if measure in _SHARES:
        return 1.0
    held = means.get((part, "length", 1), means[key])
    return float(max(one.abs().max() for one in held.values()))


def mean_cross(part: str, layers: Iterable[Cross | None]) -> Cross:
    """Return the mean of the effects of one part over the layers that have it."""
    held: dict[str, Tensor] = {}
    count = 0
    for cross in layers:
        if cross is None:
            continue
        count += 1
        for side in _SIDES:
            tensor = getattr(cross, side)
            if tensor is not None:
                held[side] = held[side] + tensor.double() if side in held else tensor.double()
    return Cross(part=part, **{side: (one / count).float() for side, one in held.items()})
