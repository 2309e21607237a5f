"""One order of axes for two tensors whose dims name them in different orders, fused or apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.compare.dims import BATCH, SEQUENCE, TOKENS, Dim
from trimtab.errors import ComparisonError

Named = list[tuple[tuple[str, ...], int, int]]
"""Names of an axis (several when fused), its size, and which dimension it is."""


class Reading(NamedTuple):
    """How one tensor is read: the order of its dimensions, and the shape that both sides then have."""

    order: tuple[int, ...]
    shape: tuple[int, ...]


def is_packed(axes: Sequence[Dim]) -> bool:
    """Whether tokens are packed in one axis."""
    return any(TOKENS in axis.names for axis in axes)


def needs_tokens(ours: Sequence[Dim], theirs: Sequence[Dim]) -> bool:
    """Whether one side packs its tokens and the other has a batch of sequences."""
    packed, padded = (ours, theirs) if is_packed(ours) else (theirs, ours)
    names = {name for axis in padded for name in axis.names}
    return is_packed(packed) and not is_packed(padded) and {BATCH, SEQUENCE} <= names


def is_dispatched(axes: Sequence[Dim]) -> bool:
    """Whether the ranks hold rows in an order of their own."""
    return any(split.how == "dispatched" for axis in axes for split in axis.splits)


def is_named(axes: Sequence[Dim] | None) -> bool:
    """Whether dims name axes; `d0 d1 d2`, as a dump counts the axes of a sharded tensor, do not."""
    return axes is not None and [axis.names for axis in axes] != [(f"d{dim}",) for dim in range(len(axes))]


def as_stored(shape: Sequence[int]) -> Reading:
    """Read a tensor as it lies."""
    return Reading(tuple(range(len(shape))), tuple(shape))


def common(
    ours: Sequence[Dim], theirs: Sequence[Dim], shapes: tuple[Sequence[int], Sequence[int]]
) -> tuple[Reading, Reading]:
    """Find one order for both sides: ours, with axes that either side fuses kept together.

    Args:
        ours: axes of the reference.
        theirs: axes of the candidate.
        shapes: shapes of the two tensors, one size per axis.

    Raises:
        ComparisonError: the axes do not pair up.
    """
    sides = [_named(axes, shape) for axes, shape in zip((ours, theirs), shapes, strict=True)]
    sides = _one_name_for_tokens(*sides)
    names = [{name for axis in side for name in axis[0]} for side in sides]
    sides = [[axis for axis in side if axis[1] != 1 or set(axis[0]) & names[1 - at]] for at, side in enumerate(sides)]
    if {name for axis in sides[0] for name in axis[0]} != {name for axis in sides[1] for name in axis[0]}:
        raise ComparisonError(
            f"the axes do not pair up: {_spelled(ours)} in the reference, {_spelled(theirs)} in the candidate"
        )
    groups = _groups(sides)
    return _reading(sides[0], groups, shapes[0]), _reading(sides[1], groups, shapes[1])


def _named(axes: Sequence[Dim], shape: Sequence[int]) -> Named:
    found: Named = []
    for dim, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if axis.names:
            found.append((axis.names, size, dim))
        elif size != 1:
            raise ComparisonError(f"dims call axis {dim} of {list(shape)} a singleton, it has {size} elements")
    return found


def _one_name_for_tokens(ours: Named, theirs: Named) -> list[Named]:
    """Call a lone sequence `t` where the other side does: a batch of one is packed as it is."""
    sides = [ours, theirs]
    for at in (0, 1):
        here = {name for axis in sides[at] for name in axis[0]}
        there = {name for axis in sides[1 - at] for name in axis[0]}
        if SEQUENCE in here and TOKENS not in here and TOKENS in there and SEQUENCE not in there:
            sides[at] = [
                (tuple(TOKENS if name == SEQUENCE else name for name in axis[0]), *axis[1:]) for axis in sides[at]
            ]
    return sides


def _groups(sides: Sequence[Named]) -> list[tuple[str, ...]]:
    """Axes in the reference's order; what a side fuses is one group."""
    fused = {name: axis[0] for side in sides for axis in side if len(axis[0]) > 1 for name in axis[0]}
    for side in sides:
        for axis in side:
            if len(axis[0]) > 1 and any(fused[name] != axis[0] for name in axis[0]):
                raise ComparisonError(
                    f"the two sides fuse axes differently: ({'*'.join(axis[0])}) against "
                    f"({'*'.join(next(fused[name] for name in axis[0] if fused[name] != axis[0]))})"
                )
    groups: list[tuple[str, ...]] = []
    for names, _, _ in sides[0]:
        for name in names:
            group = fused.get(name, (name,))
            if group not in groups:
                groups.append(group)
    return groups


def _reading(side: Named, groups: Sequence[tuple[str, ...]], shape: Sequence[int]) -> Reading:
    order: list[int] = []
    sizes: list[int] = []
    for group in groups:
        dims = [dim for names, _, dim in side if names == group]
        if not dims:
            dims = [next(dim for names, _, dim in side if names == (name,)) for name in group]
        order += dims
        sizes.append(math.prod(shape[dim] for dim in dims))
    return Reading((*order, *(dim for dim in range(len(shape)) if dim not in order)), tuple(sizes))


def _spelled(axes: Sequence[Dim]) -> str:
    return repr(" ".join(axis.text for axis in axes))
