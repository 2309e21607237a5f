"""Lengths, angles and inner products of rows, summed in float64 a piece at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_PIECE = 1 << 18


class Apart(NamedTuple):
    """How far rows of two matrices are apart; float64, [...] without the last dimension."""

    base: Tensor
    """Length of the first."""
    tuned: Tensor
    """Length of the second."""
    change: Tensor
    """Length of the difference."""
    angle: Tensor
    """Radians, 0 to pi: 2 asin(|a/|a| - b/|b|| / 2), exact at small angles; 0 when both are zero, pi/2 when one is."""


def apart(base: Float[Tensor, "*row d"], tuned: Float[Tensor, "*row d"]) -> Apart:
    """Measure rows of one shape against each other."""
    shape = base.shape[:-1]
    parts = [
        _apart(one, other)
        for one, other in zip(_pieces(base), _pieces(tuned), strict=True)
    ]  # fmt: skip
    return Apart(*(torch.cat(columns).reshape(shape) for columns in zip(*parts, strict=True)))


def inner(rows: Float[Tensor, "*row d"], others: Float[Tensor, "n d"]) -> Tensor:
    """Return the inner product of row i (of any leading axes) with row i of `others`, summed in float64: [*row]."""
    if rows.ndim == 2:
        return (rows * others).sum(-1, dtype=torch.float64).cpu()
    return torch.stack([inner(one, others) for one in rows])


def distance(base: Float[Tensor, "*row d"], tuned: Float[Tensor, "*row d"]) -> Tensor:
    """Return |tuned - base| of every row, summed in float64: [*row]."""
    if base.ndim == 2:
        return (tuned - base).square_().sum(-1, dtype=torch.float64).sqrt().cpu()
    return torch.stack([distance(one, other) for one, other in zip(base, tuned, strict=True)])


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    flat = rows.reshape(-1, rows.shape[-1])
    return torch.split(flat, max(1, _PIECE // flat.shape[1]))


def _apart(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b = one.double(), other.double()
    first, second = a.norm(dim=-1), b.norm(dim=-1)
    tiny = torch.finfo(torch.float64).tiny
    chord = (a / first.clamp_min(tiny)[:, None] - b / second.clamp_min(tiny)[:, None]).norm(dim=-1)
    angle = 2 * torch.asin((chord / 2).clamp(max=1.0))
    single = (first == 0) != (second == 0)
    angle = torch.where(single, torch.full_like(angle, torch.pi / 2), angle)
    return first.cpu(), second.cpu(), (b - a).norm(dim=-1).cpu(), angle.cpu()
