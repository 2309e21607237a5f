"""Measurements of one layer as rows: one a direction, head and measure, or one a pair of directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from trimtab.weights.directions import DirectionSet
from trimtab.weights.statistics import Array, Baseline, of_controls, of_pairs

SCHEMA: dict[str, Any] = {
    "layer": pl.Int32,
    "part": pl.String,
    "head": pl.Int32,
    "measure": pl.String,
    "sign": pl.Int8,
    "direction": pl.String,
    "kind": pl.String,
    "other": pl.String,
    "other_kind": pl.String,
    "base": pl.Float64,
    "tuned": pl.Float64,
    "delta": pl.Float64,
    "z_base": pl.Float64,
    "z_tuned": pl.Float64,
    "z": pl.Float64,
    "z_error": pl.Float64,
}
"""Columns of the Parquet files, version 1. `head`, `other`, `base` and `tuned` are null where a measure has none."""
ROUNDING = 16.0
"""Units of rounding that a change must exceed to stand out, where the controls do not change at all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """One measure of every direction.

    Args:
        part: qk, vo, mlp, or the name of a matrix.
        measure: what was measured.
        delta: float64 [..., n]; a leading axis is that of the heads.
        base: of the base model, of the same shape; None for a measure of the change alone.
        tuned: likewise.
        sign: 1 when the directions were put in, -1 when their opposites were.
        scale: size of what `delta` is a difference of, for the rounding floor.
    """

    part: str
    measure: str
    delta: Tensor
    base: Tensor | None = None
    tuned: Tensor | None = None
    sign: int = 1
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Cross:
    """One effect of every direction on every other one: float32 [n, n], rows act on columns."""

    part: str
    delta: Tensor
    base: Tensor | None = None
    tuned: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerPart:
    """Everything that was measured at one layer."""

    layer: int
    rows: pl.DataFrame
    crosses: tuple[Cross, ...] = ()
    matrices: tuple[dict[str, Any], ...] = ()
    norms: tuple[dict[str, Any], ...] = field(default=())


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """z-scores of one measure."""

    base: Array | None
    tuned: Array | None
    z: Array
    error: Array


SQUARES = ("angular", "cosine_distance")
"""Measures that grow with the square of an angle: z-scores are of their square roots, whose tails are not as heavy."""


def score(change: Change, reference: Sequence[int], unit: float) -> Scored:
    """Compare every direction with the controls `reference`, taken one by one.

    Args:
        change: the measure.
        reference: rows of the controls.
        unit: unit roundoff of the arithmetic.
    """
    where = list(reference)
    scored = [
        None if one is None else _z(one.numpy(), where, unit, change.scale)[0] for one in (change.base, change.tuned)
    ]
    delta = change.delta.sqrt() if change.measure in SQUARES else change.delta
    z, error = _z(delta.numpy(), where, unit, change.scale)
    return Scored(base=scored[0], tuned=scored[1], z=z, error=error)


def score_cross(values: Array, reference: Sequence[int], unit: float, scale: float) -> Baseline:
    """Return the baseline of pairs of different controls."""
    where = np.asarray(reference)
    return of_pairs(values[np.ix_(where, where)].astype(np.float64), floor=ROUNDING * unit * scale)


def _z(values: Array, where: list[int], unit: float, scale: float) -> tuple[Array, Array]:
    baseline = of_controls(values[..., where], floor=ROUNDING * unit * scale)
    return baseline.z(values), baseline.error(values)


def direction_rows(
    layer: int | None, changes: Sequence[Change], directions: DirectionSet, reference: Sequence[int], unit: float
) -> pl.DataFrame:
    """Return one row a direction, head and measure; `layer` None: a mean over layers."""
    names = pl.Series([one.name for one in directions], dtype=pl.String)
    kinds = pl.Series(list(directions.kinds), dtype=pl.String)
    frames = []
    for change in changes:
        scored = score(change, reference, unit)
        heads = change.delta.shape[0] if change.delta.ndim == 2 else 1
        head = (
            np.repeat(np.arange(heads, dtype=np.int32), len(names))
            if change.delta.ndim == 2
            else pl.Series([None], dtype=pl.Int32).extend_constant(None, len(names) - 1)
        )
        columns = {
            "layer": _constant(layer, heads * len(names), pl.Int32),
            "part": _constant(change.part, heads * len(names), pl.String),
            "head": pl.Series(head, dtype=pl.Int32),
            "measure": _constant(change.measure, heads * len(names), pl.String),
            "sign": _constant(change.sign, heads * len(names), pl.Int8),
            "direction": _repeated(names, heads),
            "kind": _repeated(kinds, heads),
            "base": _flat(change.base),
            "tuned": _flat(change.tuned),
            "delta": _flat(change.delta),
            "z_base": _flat(scored.base),
            "z_tuned": _flat(scored.tuned),
            "z": _flat(scored.z),
            "z_error": _flat(scored.error),
        }
        frames.append(_frame(columns, heads * len(names)))
    return pl.concat(frames) if frames else pl.DataFrame(schema=SCHEMA)


def pair_rows(
    layer: int | None,
    cross: Cross,
    directions: DirectionSet,
    reference: Sequence[int],
    unit: float,
    most: int | None,
    *,
    scale: float | None = None,
) -> pl.DataFrame:
    """Return one row a pair of different directions; controls are compared with, not listed.

    Args:
        layer: of the measurement; None: a mean over layers.
        cross: the effects.
        directions: all of them, controls among them.
        reference: rows of the controls to compare with.
        unit: unit roundoff of the arithmetic.
        most: pairs to keep at either end of delta's z (and of the base's and the tuned model's); None keeps all.
        scale: size of what the effects are parts of, for the rounding floor; None: the largest effect.
    """
    own = np.asarray([place for place, kind in enumerate(directions.kinds) if kind != "control"])
    size = max(map(_largest, (cross.base, cross.tuned, cross.delta))) if scale is None else scale
    values, scores, error = {}, {}, None
    for name, matrix in (("base", cross.base), ("tuned", cross.tuned), ("delta", cross.delta)):
        if matrix is None:
            continue
        wide = matrix.numpy().astype(np.float64)
        baseline = score_cross(wide, reference, unit, size)
        values[name] = wide[np.ix_(own, own)].reshape(-1)
        scores[name] = baseline.z(values[name])
        if name == "delta":
            error = baseline.error(values[name])
    first, second = (axis.reshape(-1) for axis in np.meshgrid(own, own, indexing="ij"))
    kept = _ends([scores[name] for name in scores], first != second, most)
    names = pl.Series([one.name for one in directions], dtype=pl.String)
    kinds = pl.Series(list(directions.kinds), dtype=pl.String)
    assert error is not None
    a, b = first[kept], second[kept]
    columns = {
        "layer": _constant(layer, len(kept), pl.Int32),
        "part": _constant(cross.part, len(kept), pl.String),
        "head": _constant(None, len(kept), pl.Int32),
        "measure": _constant("interaction", len(kept), pl.String),
        "sign": _constant(1, len(kept), pl.Int8),
        "direction": names.gather(a),
        "kind": kinds.gather(a),
        "other": names.gather(b),
        "other_kind": kinds.gather(b),
        **{name: pl.Series(values[name][kept]) for name in values},
        **{f"z_{name}" if name != "delta" else "z": pl.Series(scores[name][kept]) for name in scores},
        "z_error": pl.Series(error[kept]),
    }
    return _frame(columns, len(kept))


def _ends(scores: list[Array], different: np.ndarray[Any, Any], most: int | None) -> np.ndarray[Any, Any]:
    """Places of the `most` smallest and largest of every score among pairs of different directions."""
    places = np.flatnonzero(different)
    if most is None or 2 * most * len(scores) >= len(places):
        return places
    chosen: list[np.ndarray[Any, Any]] = []
    for values in scores:
        part = values[places]
        for side in (part, -part):
            chosen.append(places[np.argpartition(side, most - 1)[:most]])
    return np.unique(np.concatenate(chosen))


def _largest(matrix: Tensor | None) -> float:
    return 0.0 if matrix is None or not matrix.numel() else float(matrix.abs().max())


def _flat(values: Tensor | Array | None) -> pl.Series | None:
    if values is None:
        return None
    array = values.numpy() if isinstance(values, torch.Tensor) else values
    return pl.Series(np.ascontiguousarray(array, dtype=np.float64).reshape(-1))


def _constant(value: Any, count: int, dtype: Any) -> pl.Series:
    return pl.Series([value], dtype=dtype).new_from_index(0, count)


def _repeated(values: pl.Series, times: int) -> pl.Series:
    return values if times == 1 else values.gather(np.tile(np.arange(len(values)), times))


def _frame(columns: dict[str, Any], count: int) -> pl.DataFrame:
    missing = {name: _constant(None, count, dtype) for name, dtype in SCHEMA.items() if columns.get(name) is None}
    merged = {name: (missing[name] if name in missing else columns[name]) for name in SCHEMA}
    return pl.DataFrame(merged, schema=SCHEMA)
