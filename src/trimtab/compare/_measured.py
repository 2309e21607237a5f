"""What one fused pass over a pair leaves behind, whatever its size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trimtab.results.comparison import Metrics

FLOOR = 0.01  # rows are judged against max(own norm, this share of the rms row norm)

_BLAS_WAKES = 4096

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Metrics of a pair with its errors by row and channel."""

    exact: bool
    """Integers and booleans: equal or not, no rounding."""
    metrics: Metrics
    coarse: Metrics | None = None
    row_error: Floats = field(default_factory=lambda: np.zeros(0))
    """|a - r| by row."""
    row_norm: Floats = field(default_factory=lambda: np.zeros(0))
    """|r| by row."""
    mean_error: float = 0.0
    channel_error: Floats = field(default_factory=lambda: np.zeros(0))
    """rms of a - r by channel; empty when there are too many channels to keep."""
    width: int = 1
    worst_flat: int = 0
    """Flat index of the largest |a - r| in rows x width."""
    first_flat: int | None = None
    """Flat index of the first difference that no tolerance excuses: an integer, a NaN or Inf in another place."""
    mismatch: str | None = None
    """A difference that no tolerance excuses: kinds of dtype, NaN or Inf in other places."""
    warnings: tuple[str, ...] = ()


def energy(values: Floats) -> float:
    """Sum of squares; long arrays stay with this thread, whose BLAS would wake others and let them spin."""
    return float(np.dot(values, values) if values.size < _BLAS_WAKES else np.einsum("i,i->", values, values))


def relative_rows(row_error: Floats, row_norm: Floats, least: float = 0.0) -> Floats:
    """|a - r| / max(|r|, 0.01 rms row norm) by row; 0 where both are 0, inf where only the denominator is.

    Args:
        row_error: |a - r| by row.
        row_norm: |r| by row.
        least: a smaller denominator than this is raised to it.
    """
    if row_error.size == 0:
        return row_error
    floor = max(FLOOR * math.sqrt(energy(row_norm) / row_norm.size), least)
    if floor > 0:
        return row_error / np.maximum(row_norm, floor)  # type: ignore[no-any-return]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = row_error / row_norm
    return np.where(row_error == 0, 0.0, ratio)
