"""From the records of a tensor to its layouts: what cuts it, what repeats it, what is missing.

Ranks that nothing in the dims tells apart stay apart: each such place is a tensor of its own, named by the coordinates
that are left over (`dp=1`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.compare.dims import COORDINATES, Dims
from trimtab.compare.layout._types import Coordinates, Layout, Piece, spelled
from trimtab.compare.layout.world import RANKED, World
from trimtab.errors import ComparisonError

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that is missing."""

    reason: str
    rank: str
    """The place that has no record, in words."""
    part: bool
    """Whether the tensor cannot be put together without it."""


@dataclass(frozen=True, slots=True)
class Arranged:
    """The tensors that the records of one name are."""

    layouts: Mapping[str, Layout]
    """Left-over coordinates as text -> layout; "" where nothing is left over."""
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class _Record:
    """A record on its way to becoming a piece."""

    piece: Piece
    at: dict[str, int]


def arrange_group(rows: Sequence[Row], dims: Sequence[Dims | None], world: World) -> Arranged:
    """Sort the records of one tensor on one side.

    Args:
        rows: with kind, rank, tp_rank and so on, micro, recomputed, ids, digests, stored, shape.
        dims: what holds for each of them.
        world: the ranks of the run.

    Raises:
        ComparisonError: dims that contradict each other or the coordinates.
    """
    stated = {one.text: one for one in dims if one is not None}
    if len(stated) > 1:
        texts = [f"{str(one)!r} on rank {row['rank']}" for row, one in zip(rows, dims, strict=True) if one is not None]
        raise ComparisonError(f"the dims contradict each other: {', '.join(list(dict.fromkeys(texts))[:4])}")
    spoken = next(iter(stated.values()), None)
    if spoken is not None and rows[0]["kind"] != "grad":
        spoken = spoken.of_values
    world = _numbered(world, spoken)
    records = [_record(row, spoken, world) for row in rows]
    declared = _declared(spoken, records)
    left = _left_over(records, declared)
    layouts: dict[str, Layout] = {}
    problems: list[Problem] = []
    places = sorted({tuple((axis, one.at[axis]) for axis in left) for one in records})
    for place in places:
        members = [one for one in records if all(one.at[axis] == index for axis, index in place)]
        problems += _missing(members, declared, spoken, dict(place), world)
        layouts[spelled(place)] = _layout(members, spoken, declared)
    return Arranged(layouts, tuple(problems))


def collapse(layouts: Mapping[str, Layout]) -> Layout | None:
    """One layout for several places that hold the same, as their digests show; None when they do not."""
    first, *others = layouts.values()
    if not all(first.same_as(other) for other in others):
        return None
    groups = [group for layout in layouts.values() for group in layout.copies]
    for number, piece in enumerate(first.pieces):
        groups.append((piece, *(other.pieces[number] for other in others)))
    return replace(first, copies=tuple(groups))


def _numbered(world: World, dims: Dims | None) -> World:
    """Where no rank says where it is and the dims know one axis, ranks are in order along it."""
    axes = {split.coordinate for split in dims.splits()} & set(RANKED) if dims is not None else set()
    return world.along(axes.pop()) if len(axes) == 1 and not world.placed else world


def _record(row: Row, dims: Dims | None, world: World) -> _Record:
    at = {axis: row[f"{axis}_rank"] for axis in RANKED if row[f"{axis}_rank"] is not None}
    at = at or dict(world.ranks.get(row["rank"] or 0, {}))
    if dims is not None and dims.split_of("micro") is not None:
        at["micro"] = row["micro"]
    if dims is not None and dims.split_of("recompute") is not None:
        at["recompute"] = int(row["recomputed"])
    everywhere = tuple(sorted(at.items()))
    at["rank"] = row["rank"] or 0
    piece = Piece(
        record_id=row["ids"][0],
        rank=row["rank"] or 0,
        at=(),
        shape=tuple(row["shape"] or ()),
        digest=row["digests"][0],
        stored=row["stored"],
        everywhere=everywhere,
    )
    return _Record(piece, at)


def _declared(dims: Dims | None, records: Sequence[_Record]) -> tuple[str, ...]:
    """Coordinates of which the dims speak and that the records have.

    Raises:
        ComparisonError: some records have a coordinate and others do not.
    """
    found = []
    for axis in COORDINATES:
        if dims is None or dims.split_of(axis) is None:
            continue
        without = [one.piece.rank for one in records if axis not in one.at]
        if not without:
            found.append(axis)
        elif len(without) < len(records):
            raise ComparisonError(f"dims {str(dims)!r} declare {axis}, but rank {without[0]} has no {axis}_rank")
    return tuple(found)


def _left_over(records: Sequence[_Record], declared: Sequence[str]) -> tuple[str, ...]:
    """Coordinates that tell records apart which the declared ones do not; the rank itself where nothing else does."""
    left: list[str] = []
    for axis in ("dp", "pp", "cp", "ep", "tp", "rank"):
        if axis in declared or any(axis not in one.at for one in records):
            continue
        groups: dict[Coordinates, set[int]] = {}
        for one in records:
            groups.setdefault(_at(one, (*declared, *left)), set()).add(one.at[axis])
        if axis == "rank":
            if not declared and not left and len(records) > 1:
                left.append(axis)
        elif any(len(values) > 1 for values in groups.values()):
            left.append(axis)
    return tuple(left)


def _layout(members: Sequence[_Record], dims: Dims | None, declared: Sequence[str]) -> Layout:
    """Pieces by coordinates; records at one place are copies of each other."""
    parts = [axis for axis in declared if dims is not None and _parts(dims, axis)]
    buckets: dict[Coordinates, list[Piece]] = {}
    for one in sorted(members, key=lambda one: (_at(one, declared), one.piece.rank)):
        at = _at(one, parts)
        buckets.setdefault(at, []).append(replace(one.piece, at=at))
    pieces = tuple(found[0] for found in buckets.values())
    return Layout(dims, pieces, tuple(tuple(found) for found in buckets.values() if len(found) > 1))


def _missing(
    members: Sequence[_Record], declared: Sequence[str], dims: Dims | None, place: Mapping[str, int], world: World
) -> list[Problem]:
    """Places along the declared axes that have no record."""
    if dims is None or not declared:
        return []
    have = {_at(one, declared) for one in members}
    stages = {one.at["pp"] for one in members if "pp" in one.at}
    want: set[Coordinates] = set()
    placed = {one.piece.rank: one.at for one in members}
    for rank, stated in world.ranks.items():
        at = placed.get(rank, stated)
        elsewhere = any(at.get(axis, index) != index for axis, index in place.items() if axis != "rank")
        if elsewhere or ("pp" not in declared and stages and at.get("pp", min(stages)) not in stages):
            continue
        want |= _like(have, at)
    for axis in declared:
        known = {dict(one)[axis] for one in have}
        size = 1 if placed.keys() >= world.ranks.keys() else world.sizes.get(axis, 1)
        for index in range(max(size, max(known) + 1)):
            if index not in known and not any(dict(one).get(axis) == index for one in want):
                want.add(((axis, index),))
    gone = sorted(one for one in want if one not in have)
    held = {_parts_of(dims, one) for one in have}
    return [
        Problem(f"{world.named(one)} has no record of it", world.named(one), _parts_of(dims, one) not in held)
        for one in gone
    ]


def _like(have: set[Coordinates], rank: Mapping[str, int]) -> set[Coordinates]:
    """The places that a rank must hold, for every micro step and pass that there is."""
    found = set()
    for one in have:
        if all(axis in rank or axis not in RANKED for axis, _ in one):
            found.add(tuple((axis, rank[axis] if axis in RANKED else index) for axis, index in one))
    return found


def _parts_of(dims: Dims, place: Coordinates) -> Coordinates:
    return tuple(pair for pair in place if _parts(dims, pair[0]))


def _parts(dims: Dims, axis: str) -> bool:
    split = dims.split_of(axis)
    return split is not None and split.how != "replicated"


def _at(one: _Record, axes: Sequence[str]) -> Coordinates:
    return tuple(sorted((axis, one.at[axis]) for axis in axes))
