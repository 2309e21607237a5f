"""The rounding law: which operation rounds to which dtype.

With `math` m, an op casts its input and its directions to m; every dot, clamp, subtraction and multiplication rounds to
m; dots and norms accumulate in float32 (float64 when m is float64). Products of two bfloat16 or float16 numbers are
exact in float32, so a dot has one rounding per addition and one at the end. Each row is reduced on its own, in the same
order whatever the number of rows, so a row's correction does not depend on the batch it came in.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Shapes: N rows, D width, K directions.


def accumulator(math: torch.dtype) -> torch.dtype:
    """Return the dtype that dots accumulate in."""
    return torch.float64 if math is torch.float64 else torch.float32


def round_to(value: float, math: torch.dtype) -> float:
    """Return `value` rounded to `math`."""
    return float(torch.tensor(value, dtype=torch.float64).to(math))


def dot(h: Tensor, u: Tensor) -> Tensor:
    """Return `<h, u>` per row, [N, 1] in the dtype of `h`; `u` [D] is already in the accumulator's dtype."""
    if h.dtype is u.dtype:
        return (h * u).sum(-1, keepdim=True)
    return (h.to(u.dtype) * u).sum(-1, keepdim=True).to(h.dtype)


def project(h: Tensor, u: Tensor) -> Tensor:
    """Return `<h, u_k>` per row and direction, [N, K] in the dtype of `h`; `u` [K, D] is in the accumulator's dtype."""
    wide = h.to(u.dtype)
    return torch.stack([(wide * one).sum(-1) for one in u], dim=-1).to(h.dtype)


def combine(weights: Tensor, u: Tensor) -> Tensor:
    """Return `sum_k weights_k u_k`, [N, D] in the dtype of `weights`: summed in the accumulator, rounded once."""
    wide = weights.to(u.dtype)
    total = wide[:, :1] * u[0]
    for index in range(1, u.shape[0]):
        total = total + wide[:, index : index + 1] * u[index]
    return total.to(weights.dtype)


def norm(h: Tensor) -> Tensor:
    """Return `|h|` per row, [N, 1] in the dtype of `h`: the root is taken in the accumulator, then rounded."""
    wide = h.to(accumulator(h.dtype))
    return (wide * wide).sum(-1, keepdim=True).sqrt().to(h.dtype)


def limit(c: Tensor, h: Tensor, max_ratio: float) -> Tensor:
    """Return `c * min(1, max_ratio |h| / |c|)` per row; a zero correction stays zero."""
    size = norm(c)
    bound = norm(h) * max_ratio
    return torch.where(size > bound, c * (bound / size), c)
