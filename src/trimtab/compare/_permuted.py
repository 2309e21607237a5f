"""Transposes and permutations: the right values in the wrong places."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from trimtab.results.comparison import Fingerprint

_HEADS = 256  # most heads that are looked for
_MOST = 2048  # rows or channels among which a permutation is searched


class _Evidence(Protocol):
    @property
    def reference(self) -> Tensor: ...

    @property
    def candidate(self) -> Tensor: ...

    @property
    def tolerance(self) -> float: ...

    def explained(self, predicted: Tensor) -> float: ...


def find_transpose(evidence: _Evidence, shape: torch.Size) -> Iterator[Fingerprint]:
    """Two dimensions swapped, then read in the old shape."""
    real = [dim for dim, size in enumerate(shape) if size > 1]
    for first, second in itertools.combinations(real, 2):
        swapped = evidence.reference.reshape(shape).transpose(first, second)
        share = evidence.explained(swapped.reshape(evidence.reference.shape))
        if share:
            detail = f"dimensions {first} and {second} of {list(shape)} are swapped"
            yield Fingerprint(kind="transpose", detail=detail, explained=share)
            return
    yield from _heads(evidence, shape)


def _heads(evidence: _Evidence, shape: torch.Size) -> Iterator[Fingerprint]:
    """Heads and tokens merged in the wrong order: `[.., s, h, d]` read as `[.., h, s, d]`, or the reverse."""
    if len(shape) < 2 or min(shape[-2:]) < 2:
        return
    length, width = shape[-2:]
    sizes = [side.square().sum() for side in (evidence.reference, evidence.candidate)]
    if abs(float(sizes[0] - sizes[1])) > 0.01 * float(sizes[0]):  # a permutation keeps the norm
        return
    for heads in [one for one in range(2, min(width, _HEADS) + 1) if width % one == 0]:
        for split in ((length, heads, width // heads), (heads, length, width // heads)):
            moved = evidence.reference.reshape(-1, *split).transpose(1, 2)
            share = evidence.explained(moved.reshape(evidence.reference.shape))
            if share:
                detail = f"dimensions 1 and 2 of {['...', *split]} are swapped: heads and tokens of {list(shape)}"
                yield Fingerprint(kind="transpose", detail=detail, explained=share, value=float(heads))
                return


def find_permutation(evidence: _Evidence) -> Iterator[Fingerprint]:
    """Rows or channels in another order; those in place stay, the others are matched to their nearest."""
    for dim, what in ((1, "channels"), (0, "rows")):
        ours, theirs = evidence.reference, evidence.candidate
        if dim == 1:
            ours, theirs = ours.T, theirs.T
        order = _order(ours, theirs, evidence.tolerance)
        if order is None:
            continue
        predicted = ours[order]
        share = evidence.explained(predicted.T if dim == 1 else predicted)
        if share:
            moved = int((order != torch.arange(len(order))).sum())
            detail = f"{moved} of {len(order)} {what} are in another order"
            yield Fingerprint(kind="permutation", detail=detail, explained=share, value=float(moved))
            return


def _order(ours: Tensor, theirs: Tensor, tolerance: float) -> Tensor | None:
    """For each vector of the candidate the index of the reference's vector it equals; None unless it is a bijection."""
    if ours.shape[1] < 2:
        return None
    scale = ours.norm(dim=1)
    moved = ((theirs - ours).norm(dim=1) > 4 * tolerance * scale.clamp_min(1e-30)).nonzero().flatten()
    if not 2 <= len(moved) <= _MOST:
        return None
    centre = ours[moved].mean(dim=0)
    distance = torch.cdist(theirs[moved] - centre, ours[moved] - centre)
    nearest = distance.argmin(dim=1)
    if len(set(nearest.tolist())) != len(nearest):
        return None
    order = torch.arange(len(ours))
    order[moved] = moved[nearest]
    return order
