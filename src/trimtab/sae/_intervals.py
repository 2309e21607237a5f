"""Ratios of sums over texts, with intervals that know that tokens of one text are alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab import stats
from trimtab.results.sae_evaluation import Measured

GROUPS = 2000
"""Texts are resampled in at most so many groups; text t belongs to group t mod GROUPS."""


class Sums:
    """Float64 sums of one number per row, by group of texts."""

    def __init__(self) -> None:
        self.values = torch.zeros(GROUPS, dtype=torch.float64)

    def add(self, groups: Tensor, rows: Tensor) -> None:
        """Add rows [n] to the groups [n] that they belong to."""
        self.values.index_add_(0, groups, rows.double().cpu())

    @property
    def total(self) -> float:
        """Sum over all groups."""
        return float(self.values.sum())


def ratio(above: Tensor, below: Tensor, seed: int) -> Measured:
    """Return `sum(above) / sum(below)` over groups of texts with its 95 % interval.

    The interval is that of the mean of the linearised ratio, `u_i = (a_i - R b_i) / mean(b)`, by the BCa bootstrap of
    `stats.bootstrap_mean` over groups (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 10, 14).
    With fewer than two groups, and for a sum of 0, its ends are NaN.

    Args:
        above: float64 [groups].
        below: the same.
        seed: of the resampling.
    """
    used = (below != 0) | (above != 0)
    a, b = above[used], below[used]
    total = float(b.sum())
    if total == 0 or not len(a):
        return Measured(value=math.nan, low=math.nan, high=math.nan)
    value = float(a.sum()) / total
    if len(a) < 2 or not math.isfinite(value):
        return Measured(value=value, low=math.nan, high=math.nan)
    shifts = (a - value * b) / b.mean()
    found = stats.bootstrap_mean(shifts.numpy(), seed=seed)
    return Measured(value=value, low=value + found.low, high=value + found.high)
