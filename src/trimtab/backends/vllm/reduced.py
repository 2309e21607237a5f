"""Reductions of recorded rows in the worker: a few numbers travel instead of the rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["", "mean", "statistics", "projection"]
MAX_DIRECTIONS = 256
"""Sets of directions that a worker keeps to project rows on."""
STATISTICS = ("mean", "std", "absmax")
"""Rows of what "statistics" gives, per channel."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """What a request wants of its rows instead of the rows themselves."""

    kind: Kind
    directions: Tensor | None = None
    """float64 [k, width of the whole site], for "projection"."""


@dataclass(slots=True)
class Reduced:
    """The rows of one request at one site in one state, reduced as they come.

    Args:
        reduction: what is kept.
        offset: first column of this rank's part in the whole site.
    """

    reduction: Reduction
    offset: int = 0
    count: int = 0
    mean: Tensor | None = None
    spread: Tensor | None = None
    absmax: Tensor | None = None
    projections: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    seen: int = -1

    def add(self, rows: Tensor, positions: Tensor) -> None:
        """Take rows [n, width]; those at positions that came before, after a preemption, are left out."""
        fresh = positions > self.seen
        if not bool(fresh.any()):
            return
        rows, positions = rows[fresh].double(), positions[fresh]
        self.seen = int(positions.max())
        self.positions.append(positions)
        if self.reduction.directions is not None:
            part = self.reduction.directions[:, self.offset : self.offset + rows.shape[1]]
            self.projections.append(rows @ part.T)
            return
        self._merge(rows)

    def _merge(self, rows: Tensor) -> None:
        """Join a block to what was there, around its own mean (Chan, Golub and LeVeque, 1979)."""
        count, mean = rows.shape[0], rows.mean(dim=0)
        spread, absmax = (rows - mean).square().sum(dim=0), rows.abs().amax(dim=0)
        if self.mean is None or self.spread is None or self.absmax is None:
            self.count, self.mean, self.spread, self.absmax = count, mean, spread, absmax
            return
        total, delta = self.count + count, mean - self.mean
        self.spread = self.spread + spread + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.absmax = torch.maximum(self.absmax, absmax)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Return what is kept, float32, and the positions it covers.

        "mean": [1, width]; "statistics": [3, width], the rows of `STATISTICS` (population deviation); "projection":
        [n, k], one row per position.
        """
        positions = torch.cat(self.positions)
        if self.projections:
            return torch.cat(self.projections).float(), positions
        assert self.mean is not None
        assert self.spread is not None
        assert self.absmax is not None
        if self.reduction.kind == "mean":
            return self.mean[None].float(), positions
        return torch.stack([self.mean, (self.spread / self.count).sqrt(), self.absmax]).float(), positions
