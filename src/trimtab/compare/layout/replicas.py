"""Ranks that must hold the same bytes, compared: by digest first, then bit by bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from trimtab.compare.layout._types import Piece
from trimtab.compare.measure import coordinates

_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """A copy that is not what the others are."""

    piece: Piece
    reason: str


def differences(copies: Sequence[Piece], load: Callable[[int], torch.Tensor]) -> Iterator[Difference]:
    """Compare copies of one tensor; with three or more, what most of them hold is right.

    Args:
        copies: pieces that are declared equal.
        load: returns the tensor of a record.
    """
    counts = Counter(piece.digest for piece in copies if piece.digest is not None)
    most = counts.most_common(1)[0][0] if counts and counts.most_common(1)[0][1] > 1 else copies[0].digest
    first = next(piece for piece in copies if piece.digest == most)
    for piece in copies:
        if piece is first or (piece.digest is not None and piece.digest == first.digest):
            continue
        if not (piece.stored and first.stored):
            if piece.digest is None or first.digest is None:
                yield Difference(piece, f"cannot be held against {first.text}: neither values nor digests were kept")
            else:
                yield Difference(piece, f"differs from {first.text} by digest; values were not kept")
            continue
        said = unequal(load(first.record_id), load(piece.record_id))
        if said is not None:
            yield Difference(piece, f"differs from {first.text}: {said}")


def unequal(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """How two tensors that should be equal to the bit differ; None when they do not."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{theirs.dtype} {list(theirs.shape)} against {ours.dtype} {list(ours.shape)}"
    flat, other = ours.reshape(-1), theirs.reshape(-1)
    count, worst, place = 0, -1.0, 0
    for start in range(0, flat.numel(), _CHUNK):
        one, two = flat[start : start + _CHUNK], other[start : start + _CHUNK]
        bits = (one.view(torch.uint8) != two.view(torch.uint8)).view(len(one), -1).any(dim=1)
        count += int(bits.sum())
        if not bits.any():
            continue
        gap = _gap(one, two)
        gap[~bits] = -1.0
        if float(gap.max()) > worst:
            worst, place = float(gap.max()), start + int(gap.argmax())
    if count == 0:
        return None
    size = f"max |difference| {worst:.3g}" if worst > 0 else "equal values in other bits"
    return f"{count} of {flat.numel()} elements, {size} at {list(coordinates(place, tuple(ours.shape)))}"


def _gap(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    wide = torch.complex128 if one.is_complex() else torch.float64
    return torch.nan_to_num((one.to(wide) - two.to(wide)).abs(), nan=float("inf"))
