"""A closer look at a pair: the tolerance it would need, its worst elements and rows, and which rank held them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch

from trimtab.compare._measured import Floats, Measured, relative_rows
from trimtab.compare.align import Aligned
from trimtab.compare.layout import View, spelled
from trimtab.compare.measure import coordinates
from trimtab.results.comparison import Number, ShardError, Tolerance, WorstElement, WorstRow

_ELEMENTS = 1 << 20
_MOST_SHARDS = 1024


class Gaps(NamedTuple):
    """Some rows of a pair: where they begin, both sides and |a - r| in float64, inf where only one is not finite."""

    start: int
    reference: torch.Tensor
    candidate: torch.Tensor
    gap: torch.Tensor


def tolerance(aligned: Aligned) -> Tolerance:
    """The smallest tolerances under which the pair would pass elementwise."""
    absolute = relative = both = 0.0
    for part in _gaps(aligned):
        if part.gap.numel() == 0:
            continue
        size = part.reference.double().abs().nan_to_num(nan=0.0, posinf=0.0)
        absolute = max(absolute, float(part.gap.max()))
        both = max(both, float((part.gap / (1 + size)).max()))
        relative = max(relative, float((part.gap / size).nan_to_num(nan=0.0, posinf=math.inf).max()))
    return Tolerance(absolute=absolute, relative=relative, both=both)


def worst_elements(aligned: Aligned, count: int) -> tuple[WorstElement, ...]:
    """The `count` elements that differ most, the worst first; of equal ones the first."""
    best: list[tuple[float, int, Number, Number]] = []
    for part in _gaps(aligned):
        flat = part.gap.reshape(-1)
        if not flat.numel():
            continue
        values, places = flat.topk(min(count, flat.numel()))
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            row, channel = divmod(place, aligned.width)
            pair = (_number(part.reference[row, channel]), _number(part.candidate[row, channel]))
            best.append((-value, part.start * aligned.width + place, *pair))
        best = sorted(best, key=lambda one: one[:2])[:count]
    found = [one for one in best if one[0] < 0]
    return tuple(
        WorstElement(index=_index(aligned, flat), reference=ours, candidate=theirs, ranks=ranks_at(aligned, flat))
        for _, flat, ours, theirs in found
    )


def worst_rows(aligned: Aligned, measured: Measured, count: int) -> tuple[WorstRow, ...]:
    """The `count` rows that differ most, the worst first."""
    relative = relative_rows(measured.row_error, measured.row_norm)
    order = np.argsort(-relative, kind="stable")[:count]
    found = []
    for row in (int(one) for one in order if relative[one] > 0):
        gap = next(_gaps(aligned, row, row + 1)).gap
        flat = row * aligned.width + int(gap.argmax())
        index = _index(aligned, row * aligned.width)
        depth = 1 if aligned.pair.positions is not None else max(len(aligned.shapes[0]) - 1, 0)
        found.append(WorstRow(index=index[:depth], error=float(relative[row]), ranks=ranks_at(aligned, flat)))
    return tuple(found)


def shard_errors(aligned: Aligned) -> tuple[ShardError, ...]:
    """The error by the places that held the candidate, or the reference where only that is shared out."""
    side, view = _shared_out(aligned)
    if view is None or view.places > _MOST_SHARDS:
        return ()
    sums = np.zeros((3, view.places))  # squared error, squared norm of the reference, elements
    for part in _gaps(aligned):
        begin, end = (row * aligned.width for row in (part.start, part.start + len(part.gap)))
        owners = _owners(aligned, view, begin, end)
        norm = part.reference.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        for at, values in ((0, part.gap.square()), (1, norm.square())):
            sums[at] += np.bincount(owners, weights=values.reshape(-1).numpy(), minlength=view.places)
        sums[2] += np.bincount(owners, minlength=view.places)
    shares = _shares(sums[0])
    found = []
    for owner in range(view.places):
        pieces = view.holders(owner)
        error, norm_of = math.sqrt(sums[0, owner]), math.sqrt(sums[1, owner])
        found.append(
            ShardError(
                side=side,
                ranks=tuple(dict.fromkeys(piece.rank for piece in pieces)),
                place=spelled(pieces[0].at),
                elements=int(sums[2, owner]),
                rel_l2=error / norm_of if norm_of > 0 else (math.inf if error > 0 else 0.0),
                share=float(shares[owner]),
            )
        )
    return tuple(found)


def ranks_at(aligned: Aligned, flat: int) -> tuple[int, ...]:
    """The ranks that held an element; those of the candidate where both sides are shared out."""
    _, view = _shared_out(aligned)
    if view is None:
        ranks = aligned.pair.ranks[1]
        return (aligned.pair.key.rank,) if aligned.pair.key.rank is not None else ranks[:1]
    owner = int(_owners(aligned, view, flat, flat + 1)[0])
    return tuple(dict.fromkeys(piece.rank for piece in view.holders(owner)))


def blame(shards: tuple[ShardError, ...]) -> str | None:
    """A sentence, where one place out of several holds the error; None where it is spread."""
    total = sum(one.elements for one in shards)
    worst = max(shards, key=lambda one: one.share, default=None)
    if worst is None or len(shards) < 2 or worst.share < 0.9 or worst.elements >= 0.75 * total:
        return None
    ranks = " and ".join(map(str, worst.ranks))
    return f"rank {ranks} of the {worst.side} ({worst.place}) holds {100 * worst.share:.3g} % of the squared error"


def _shared_out(aligned: Aligned) -> tuple[Literal["reference", "candidate"], View | None]:
    if aligned.views is None:
        return "candidate", None
    if aligned.views.candidate.places > 1 or aligned.views.reference.places == 1:
        return "candidate", aligned.views.candidate
    return "reference", aligned.views.reference


def _owners(aligned: Aligned, view: View, begin: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Owners of real elements; a complex element counts as two."""
    if not aligned.dtypes[0].is_complex:
        return view.owners(begin, end)
    owners = np.repeat(view.owners(begin // 2, -(-end // 2)), 2)
    return owners[begin % 2 : begin % 2 + end - begin]


def _gaps(aligned: Aligned, begin: int = 0, end: int | None = None) -> Iterator[Gaps]:
    step = max(1, _ELEMENTS // max(aligned.width, 1))
    for start in range(begin, aligned.rows if end is None else end, step):
        stop = min(start + step, aligned.rows if end is None else end)
        _, reference, candidate = aligned.between(start, stop)
        ours, theirs = reference.double(), candidate.double()
        gap = (theirs - ours).abs()
        equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
        gap = torch.where(equal, 0.0, gap.nan_to_num(nan=math.inf))
        yield Gaps(start, reference, candidate, gap)


def _shares(squares: Floats) -> Floats:
    if np.isinf(squares).any():
        squares = np.isinf(squares).astype(np.float64)
    total = squares.sum()
    return squares / total if total > 0 else squares


def _index(aligned: Aligned, flat: int) -> tuple[int, ...]:
    index = coordinates(flat, aligned.shape)
    if aligned.pair.positions is not None and index:
        return (int(aligned.pair.positions[index[0]]), *index[1:])
    return index


def _number(value: torch.Tensor) -> Number:
    found = value.item()
    assert isinstance(found, int | float)
    return int(found) if isinstance(found, bool) else found
