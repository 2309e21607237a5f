"""What the rows of an error have in common, where no single prediction undoes the mistake."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from trimtab.numerics.dtypes import dtype_name, unit_roundoff
from trimtab.results.comparison import Fingerprint

_COARSE = (torch.bfloat16, torch.float16)


class _Evidence(Protocol):
    @property
    def reference(self) -> Tensor: ...

    @property
    def candidate(self) -> Tensor: ...

    @property
    def tolerance(self) -> float: ...

    def explained(self, predicted: Tensor) -> float: ...

    def off(self, times: float) -> Tensor: ...


def find_patterns(evidence: _Evidence, shape: torch.Size, dtype: torch.dtype) -> Iterator[Fingerprint]:
    """Look for factors by row, for rows of a sequence that stay right, and for errors of a coarser dtype's size."""
    yield from _row_scale(evidence)
    yield from _sequences(evidence, shape)
    yield from _coarse_arithmetic(evidence, dtype)


def _row_scale(evidence: _Evidence) -> Iterator[Fingerprint]:
    """Every row has a factor of its own: what divides a row by its size (norm, its eps, its order) is another one."""
    reference, candidate = evidence.reference, evidence.candidate
    if reference.shape[0] < 4 or reference.shape[1] < 8:
        return
    square = reference.square().sum(dim=1)
    factor = torch.where(square > 0, (reference * candidate).sum(dim=1) / square.clamp_min(1e-300), 1.0)
    share = evidence.explained(reference * factor[:, None])
    if share and bool((factor > 0).all()) and float(factor.max() - factor.min()) > evidence.tolerance:
        detail = f"every row has a factor of its own, from {float(factor.min()):.4g} to {float(factor.max()):.4g}"
        yield Fingerprint(kind="row_scale", detail=f"{detail}: a norm, its eps or its order?", explained=share)


def _sequences(evidence: _Evidence, shape: torch.Size) -> Iterator[Fingerprint]:
    """The first token of a sequence attends to itself alone, the last one is seen by no other."""
    if len(shape) < 3 or shape[-2] < 4:
        return
    off = evidence.off(1).view(-1, shape[-2])
    if float(off.double().mean()) < 0.5:
        return
    if not off[:, 0].any() and off[:, 1:].double().mean() > 0.8:
        detail = "the first token of every sequence agrees and later ones do not: scores, rotary embedding or mask?"
        yield Fingerprint(kind="attention", detail=detail, explained=0.6)
    elif not off[:, -1].any() and off[:, :-1].double().mean() > 0.8:
        detail = "the last token of every sequence agrees and earlier ones do not: they see tokens that come later"
        yield Fingerprint(kind="mask_edge", detail=detail, explained=0.6)


def _coarse_arithmetic(evidence: _Evidence, dtype: torch.dtype) -> Iterator[Fingerprint]:
    """Noise of the size of a coarser dtype's roundings, in every row: a cast before or inside of the operation."""
    error = evidence.candidate - evidence.reference
    norm, size = float(evidence.reference.norm()), float(error.norm())
    if norm == 0 or size == 0 or not dtype.is_floating_point:
        return
    relative, count = size / norm, error.numel()
    common = abs(float((error * evidence.reference).sum())) / (norm * size)
    rows = error.norm(dim=1) / evidence.reference.norm(dim=1).clamp_min(1e-300)
    even = float(rows.quantile(0.9)) < 6 * float(rows.median()) if len(rows) > 3 else False
    for coarse in _COARSE:
        roundoff = unit_roundoff(coarse)
        if roundoff <= unit_roundoff(dtype) or not 0.2 * roundoff < relative < 2 * roundoff:
            continue
        if even and common < max(6 / math.sqrt(count), 0.05):
            detail = f"noise of {relative / roundoff:.2g} roundings of {dtype_name(coarse)} in every row: a cast?"
            yield Fingerprint(kind="coarse_arithmetic", detail=detail, explained=0.55, value=roundoff)
            return
