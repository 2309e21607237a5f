"""The one table of tolerances; `docs/numerics.md` shows the same numbers.

Tests and verdicts read bounds from here and from nowhere else. They bound *correct* implementations that differ in
the order of their sums (another engine, another batch size, cached decode); a wrong computation is usually far above.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch

from trimtab.errors import InputError
from trimtab.numerics.dtypes import dtype_name, resolve_dtype

ROW_REL_L2: Final[dict[torch.dtype, float]] = {
    torch.float64: 4e-15,  # float32's bound times the ratio of the unit roundoffs, rounded up
    torch.float32: 2e-6,
    torch.float16: 8e-4,
    torch.bfloat16: 6e-3,
}
"""Relative L2 error of a row of `layers.0`; it grows with depth by `sqrt(1 + 2 l)`."""


class DecodeTolerance(NamedTuple):
    """What cached float32 decoding may differ from one full forward, per row."""

    rel_l2: float
    """`|a - r| / |r|` of a row."""
    max_abs: float
    """Largest absolute difference of a row, in units of the row's largest magnitude."""


def row_rel_l2(dtype: str | torch.dtype, layer: int) -> float:
    """Return the bound on a row's rel_l2 between two correct computations of one site: `table[dtype] sqrt(1 + 2 l)`.

    Args:
        dtype: the model's dtype: float64, float32, float16 or bfloat16.
        layer: 0-based layer of the site (for the final norm and the logits: the number of layers).

    Raises:
        InputError: for a dtype that the table does not hold, or a negative layer.
    """
    resolved = resolve_dtype(dtype)
    base = ROW_REL_L2.get(resolved)
    if base is None:
        known = ", ".join(dtype_name(key) for key in ROW_REL_L2)
        raise InputError(f"no tolerance for {dtype_name(resolved)}; the table holds {known}")
    if layer < 0:
        raise InputError(f"got layer={layer}; expected a 0-based layer >= 0 (resolve -1 first)")
    return base * math.sqrt(1 + 2 * layer)


def engine_row_rel_l2(dtype: str | torch.dtype, layer: int) -> float:
    """Return `row_rel_l2`: two engines are held to the same bound as two schedules of one engine."""
    return row_rel_l2(dtype, layer)


def decode_vs_forward() -> DecodeTolerance:
    """Return the bounds of float32 cached decoding against one full forward over the same tokens."""
    return DecodeTolerance(rel_l2=5e-6, max_abs=5e-6)
