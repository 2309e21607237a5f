"""What an op did, row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from trimtab.sites import Site
from trimtab.steering._arithmetic import accumulator, norm
from trimtab.steering.ops import Kernel, Raw

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


def measure(kernel: Kernel, raw: Raw, states: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the columns of a full dose, one number per row.

    Args:
        kernel: the op.
        raw: what it computed.
        states: [N, D] each: the state before the op, the correction that was applied, and the state after.
    """
    before, change, after = states
    zero = torch.zeros_like(before[:, 0], dtype=torch.float32)
    p_before = zero if kernel.probe is None else _along(before, kernel.probe)
    if raw.projection is not None:
        p_before = _size(raw.projection)
    clamped = raw.clamped
    if clamped is None and kernel.clamps and raw.adjustment is not None:
        clamped = raw.adjustment != 0
    measured = {
        "p_before": p_before,
        "p_after": zero if kernel.probe is None else _along(after, kernel.probe),
        "cap_delta": zero if raw.adjustment is None else _size(raw.adjustment),
        "clamped": zero.bool() if clamped is None else clamped[:, 0],
        "ratio": (norm(change.float()) / norm(before.float()))[:, 0].nan_to_num(nan=0.0, posinf=float("inf")),
    }
    if raw.violation is not None:
        measured["violation"] = raw.violation[:, 0].float()
    return measured


def _along(state: Tensor, probe: Tensor) -> Tensor:
    wide = state.to(probe.dtype)
    return _size(torch.stack([(wide * u).sum(-1) for u in probe], dim=-1))


def _size(values: Tensor) -> Tensor:
    """Return one number per row: the value itself along one direction, the norm along several; float32 [N]."""
    wide = values.to(accumulator(values.dtype))
    return (wide[:, 0] if wide.shape[1] == 1 else wide.norm(dim=1)).float()
