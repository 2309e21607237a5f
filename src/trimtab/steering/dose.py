"""What an op did, row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from trimtab.sites import Site

Detail: TypeAlias = Literal["counts", "full"]


@dataclass(frozen=True, slots=True)
class OpDose:
    """One op at one site in one forward pass, over the M rows that it selected.

    With detail "counts" only `rows` is filled. With "full": `p_before` and `p_after` are the projections on the op's
    unit direction before the op and after it (norms of the coordinates for a subspace); `cap_delta` is
    `clamp(k p + b) - p`, the adjustment alone (0 for ops without one); `ratio` is |applied correction| / |h|. All
    float32 [M].
    """

    site: Site
    op: str
    """Place among the ops of the site, and kind: "0:Cap"."""
    rows: int | Tensor
    """How many rows it selected; a tensor on an accelerator, so that counting does not stall it."""
    positions: Tensor | None = None
    p_before: Tensor | None = None
    p_after: Tensor | None = None
    cap_delta: Tensor | None = None
    clamped: Tensor | None = None
    """bool [M]: whether a bound was active."""
    ratio: Tensor | None = None
    violation: Tensor | None = None
    """[M]: how far the worst bound is still missed after the sweeps of CapSubspace."""

    @property
    def count(self) -> int:
        """`rows` as an int."""
        return int(self.rows)

    def pick(self, index: Tensor) -> OpDose:
        """Return the dose of some of its rows, for instance those of one request.

        Args:
            index: bool [M] or int64 [K], into the rows of this dose.
        """
        names = ("positions", "p_before", "p_after", "cap_delta", "clamped", "ratio", "violation")
        taken: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[index] for name in names
        }
        rows = int(index.sum()) if index.dtype is torch.bool else index.numel()
        return replace(self, rows=rows, **taken)
