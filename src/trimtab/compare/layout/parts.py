"""Axes of parts one behind the other, such as query, key and value in one projection, shared out part by part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from trimtab.compare.dims import Dim
from trimtab.compare.layout._types import Coordinates, Layout, Piece, Run
from trimtab.compare.layout.replicas import Difference, unequal
from trimtab.errors import ComparisonError


@dataclass(frozen=True, slots=True)
class _Share:
    """What each rank holds of one part."""

    offset: int
    """Units of its axis, or of a group, that lie before it."""
    units: int
    copies: int
    """How many neighbouring ranks hold the same."""


def part_runs(axis: Dim, values: Mapping[str, Sequence[int]], lengths: Mapping[Coordinates, int]) -> list[Run]:
    """Where the ranks hold the parts of an axis; whole, all of the first part come first.

    Args:
        axis: with its parts.
        values: indices along every coordinate that tells ranks apart.
        lengths: the size of the axis on the ranks at some coordinates.

    Raises:
        ComparisonError: sizes that cannot be cut like that.
    """
    ranks = _ranks(axis, values)
    size = lengths[ranks[0]]
    if any(lengths.get(at) != size for at in ranks):
        raise ComparisonError(f"the ranks hold unequal shares of {axis.text}: {sorted(set(lengths.values()))} elements")
    if len(ranks) == 1 and not axis.groups:
        return [Run(0, size, 0, ranks[0])]
    shares, groups = _shares(axis, len(ranks))
    period = sum(share.units for share in shares)
    unit, rest = divmod(size, period * groups)
    if rest:
        raise ComparisonError(
            f"{size} elements of {axis.text} cannot be cut into {period * groups} equal units, as its counts on "
            f"{len(ranks)} ranks ask for"
        )
    runs: list[Run] = []
    at = 0
    for share in shares:
        for number in range(0, len(ranks), share.copies):
            for group in range(groups):
                stop = at + share.units * unit
                runs.append(Run(at, stop, (group * period + share.offset) * unit, ranks[number]))
                at = stop
    return [run for run in runs if run.stop > run.start] or [Run(0, 0, 0, ranks[0])]


def part_differences(layout: Layout, load: Callable[[int], torch.Tensor]) -> Iterator[Difference]:
    """Compare the parts that several ranks hold because there are fewer units than ranks.

    Raises:
        ComparisonError: sizes that cannot be cut like that.
    """
    for dim, axis in enumerate(layout.axes or ()):
        if not axis.parts or axis.groups or not all(dim < len(piece.shape) for piece in layout.pieces):
            continue
        names = tuple(name for name, _ in layout.pieces[0].at)
        ranks = _ranks(axis, {name: sorted({dict(one.at)[name] for one in layout.pieces}) for name in names})
        shares, _ = _shares(axis, len(ranks))
        if all(one.copies == 1 for one in shares):
            continue
        placed = sorted((*_place(piece, ranks), piece.record_id, piece) for piece in layout.pieces)
        for (rest, first, _, one), (rest_of_other, second, _, other) in itertools.pairwise(placed):
            fits = rest == rest_of_other and one.shape == other.shape and one.stored and other.stored
            for part, share in zip(axis.parts, shares, strict=True) if fits else ():
                if first // share.copies == second // share.copies:
                    yield from _part_difference(part.name, share, (one, other), dim, shares, load)


def _place(piece: Piece, ranks: Sequence[Coordinates]) -> tuple[Coordinates, int]:
    """Where a piece is along other axes, and its number among the ranks that share this one."""
    mine = {name for at in ranks for name, _ in at}
    rest = tuple(pair for pair in piece.at if pair[0] not in mine)
    return rest, ranks.index(tuple(pair for pair in piece.at if pair[0] in mine))


def _part_difference(
    name: str,
    share: _Share,
    pieces: tuple[Piece, Piece],
    dim: int,
    shares: Sequence[_Share],
    load: Callable[[int], torch.Tensor],
) -> Iterator[Difference]:
    """Compare one part that two ranks both hold."""
    unit = pieces[0].shape[dim] // sum(one.units for one in shares)
    span = (dim, share.offset * unit, share.units * unit)
    said = unequal(*(load(piece.record_id).narrow(*span).contiguous() for piece in pieces))
    if said is not None:
        yield Difference(pieces[1], f"differs from {pieces[0].text} in {name}, which both hold: {said}")


def _ranks(axis: Dim, values: Mapping[str, Sequence[int]]) -> list[Coordinates]:
    """Coordinates of the ranks that share the axis, in order."""
    names = [split.coordinate for split in axis.splits if split.coordinate in values]
    every = itertools.product(*(values[name] for name in names))
    return [tuple(sorted(zip(names, at, strict=True))) for at in every]


def _shares(axis: Dim, ranks: int) -> tuple[list[_Share], int]:
    """What each rank holds of every part, and how many groups it holds.

    Raises:
        ComparisonError: counts that the ranks cannot share.
    """
    counts = [part.count or 1 for part in axis.parts]
    groups, rest = divmod(axis.groups, ranks) if axis.groups else (1, 0)
    if rest:
        raise ComparisonError(f"{axis.groups} groups of {axis.text} cannot be shared by {ranks} ranks")
    shares: list[_Share] = []
    for part, count in zip(axis.parts, counts, strict=True):
        whole = axis.groups > 0 or part.count is None  # equal parts are cut wherever the ranks ask for it
        if not whole and count % ranks and ranks % count:
            raise ComparisonError(f"{count} units of {part.name} in {axis.text} cannot be shared by {ranks} ranks")
        copies = 1 if whole else ranks // math.gcd(ranks, count)
        units = count if whole else max(1, count // ranks)
        shares.append(_Share(sum(one.units for one in shares), units, copies))
    return shares, groups
