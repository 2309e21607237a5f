"""Two tensors made ready to be read in step, whatever the layouts they were recorded in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trimtab.compare.dims import BATCH, SEQUENCE, TOKENS, Dim
from trimtab.compare.layout._types import Layout, Piece
from trimtab.compare.layout.assemble import Assembled, Load
from trimtab.compare.layout.axes import Reading, as_stored, common, is_dispatched, is_named, is_packed, needs_tokens
from trimtab.compare.layout.tokens import IDS, Ints, Stretches, TokenPairs, pair_ids, pair_tokens
from trimtab.errors import ComparisonError


@dataclass(frozen=True, slots=True)
class TokenMatch:
    """Where the ids of both sides are recorded, by which packed and padded, or dispatched, tokens are paired."""

    ids: tuple[Layout, Layout]
    mask: Layout | None
    """The padded side's attention mask."""
    sequences: int | None
    """The packed side's record of cumulative sequence lengths; None: one sequence."""


class View:
    """One side of a pair in the common order; elements are read by their flat position.

    Args:
        tensor: the tensor, in the order in which it is read.
        shape: the shape that both sides have.
        stretches: the tokens to read, where not all of them are compared; the tensor's first axes are then tokens.
    """

    def __init__(self, tensor: Assembled, shape: tuple[int, ...], stretches: Stretches | None = None) -> None:
        self._tensor = tensor
        self.shape = shape
        self.dtype = tensor.dtype
        self._stretches = stretches
        self._inner = math.prod(shape[1:])

    def flat(self, begin: int, end: int) -> torch.Tensor:
        """Elements `[begin, end)`."""
        if self._stretches is None:
            return self._tensor.flat(begin, end)
        parts = [self._tensor.flat(low, high) for low, high in self._spans(begin, end)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def owners(self, begin: int, end: int) -> npt.NDArray[np.int32]:
        """For the elements `[begin, end)`, the number of the place that held them; see `holders`."""
        if self._stretches is None:
            return self._tensor.owners(begin, end)
        return np.concatenate([self._tensor.owners(low, high) for low, high in self._spans(begin, end)])

    def holders(self, owner: int) -> tuple[Piece, ...]:
        """The pieces at a place: one, or the terms of a sum."""
        return self._tensor.holders(owner)

    @property
    def places(self) -> int:
        """How many places hold the tensor."""
        return len(self._tensor.owners_at)

    def _spans(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Stretches of the tensor that hold the elements asked for."""
        assert self._stretches is not None
        inner, found = self._inner, []
        bounds = np.concatenate([[0], np.cumsum(self._stretches.lengths)]) * inner
        for number in range(int(np.searchsorted(bounds, begin, side="right")) - 1, len(self._stretches.lengths)):
            low, high = max(begin, int(bounds[number])), min(end, int(bounds[number + 1]))
            if int(bounds[number]) >= end:
                break
            shift = int(self._stretches.starts[number]) * inner - int(bounds[number])
            if low < high:
                found.append((low + shift, high + shift))
        return found


class ViewPair(NamedTuple):
    """Both sides, and the tokens that only one of them has."""

    reference: View
    candidate: View
    tokens: TokenPairs | None = None
    packed_first: bool = True


def view_pair(layouts: tuple[Layout, Layout], loads: tuple[Load, Load], tokens: TokenMatch | None) -> ViewPair:
    """Make two tensors ready to be read in step.

    Args:
        layouts: how they are made of their pieces.
        loads: return the tensor of a record of either side.
        tokens: where to find token ids, if packed stand against padded ones.

    Raises:
        ComparisonError: pieces that do not fit together, axes that do not pair up.
    """
    tensors = (Assembled(layouts[0], loads[0]), Assembled(layouts[1], loads[1]))
    ours, theirs = layouts[0].axes, layouts[1].axes
    if ours is None or theirs is None or not (is_named(ours) and is_named(theirs)):
        readings = [as_stored(tensor.shape) for tensor in tensors]
    elif is_dispatched(ours) or is_dispatched(theirs):
        return _by_ids(tensors, (ours, theirs), loads, tokens)
    elif needs_tokens(ours, theirs):
        return _by_tokens(tensors, (ours, theirs), loads, tokens)
    else:
        readings = list(common(ours, theirs, (tensors[0].shape, tensors[1].shape)))
    views = [
        View(tensor.reordered(reading.order), reading.shape) for tensor, reading in zip(tensors, readings, strict=True)
    ]
    return ViewPair(views[0], views[1])


def _by_tokens(
    tensors: tuple[Assembled, Assembled],
    axes: tuple[tuple[Dim, ...], tuple[Dim, ...]],
    loads: tuple[Load, Load],
    match: TokenMatch | None,
) -> ViewPair:
    if match is None:
        raise ComparisonError(
            "one side packs its tokens and the other pads them; record input_ids with dims on both sides to align them"
        )
    packed = 0 if is_packed(axes[0]) else 1
    pairs = _token_pairs(match, loads, packed)
    readings = [_tokens_first(axes[at], tensors[at].shape) for at in (0, 1)]
    stretches = (pairs.packed, pairs.padded) if packed == 0 else (pairs.padded, pairs.packed)
    return ViewPair(*_row_views(tensors, axes, readings, stretches), pairs, packed == 0)


def _by_ids(
    tensors: tuple[Assembled, Assembled],
    axes: tuple[tuple[Dim, ...], tuple[Dim, ...]],
    loads: tuple[Load, Load],
    match: TokenMatch | None,
) -> ViewPair:
    """Rows that were routed to the ranks, paired by their ids."""
    if match is None:
        raise ComparisonError(
            f"its rows were dispatched, in an order of their own; record {IDS} of the same layer on both sides, one id "
            "per row, with dims for the rows"
        )
    name = next(axis.names for side in axes for axis in side if is_dispatched([axis]))
    readings, ids = [], []
    for at in (0, 1):
        dims = [dim for dim, axis in enumerate(axes[at]) if axis.names == name]
        if not dims:
            raise ComparisonError(f"only one side has an axis {'*'.join(name)!r}, whose rows were dispatched")
        readings.append((dims[0],))
        ids.append(_row_ids(match.ids[at], loads[at], tensors[at].shape[dims[0]]))
    pairs = pair_ids(ids[0], ids[1])
    return ViewPair(*_row_views(tensors, axes, readings, (pairs.packed, pairs.padded)), pairs)


def _row_ids(layout: Layout, load: Load, rows: int) -> Ints:
    """The ids of dispatched rows, [rows, numbers of an id]."""
    tensor = Assembled(layout, load)
    if not tensor.shape or tensor.shape[0] != rows or tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        raise ComparisonError(f"{IDS} are {tensor.dtype} of shape {list(tensor.shape)}; {rows} rows need integer ids")
    return tensor.flat(0, math.prod(tensor.shape)).numpy().astype(np.int64).reshape(rows, -1)


def _row_views(
    tensors: tuple[Assembled, Assembled],
    axes: tuple[tuple[Dim, ...], tuple[Dim, ...]],
    readings: Sequence[tuple[int, ...]],
    stretches: tuple[Stretches, Stretches],
) -> tuple[View, View]:
    """Both sides with their rows first, of which those in the stretches are read."""
    inner = _inner(axes, (tensors[0].shape, tensors[1].shape), readings)
    views = []
    for at in (0, 1):
        order = (*readings[at], *(dim for dim in inner[at].order if dim not in readings[at]))
        views.append(View(tensors[at].reordered(order), (stretches[at].tokens, *inner[at].shape), stretches[at]))
    return views[0], views[1]


def _token_pairs(match: TokenMatch, loads: tuple[Load, Load], packed: int) -> TokenPairs:
    """Read the ids of both sides and pair them."""
    ids = []
    for at in (0, 1):
        tensor = Assembled(match.ids[at], loads[at])
        axes = match.ids[at].axes
        if axes is None:
            raise ComparisonError("input_ids have no dims; give them with dims=('input_ids: b s',) and so on")
        order = _tokens_first(axes, tensor.shape)
        if math.prod(tensor.shape[dim] for dim in order) != math.prod(tensor.shape):
            raise ComparisonError(f"input_ids have axes beside tokens: dims {str(match.ids[at].dims)!r}")
        rest = tuple(dim for dim in range(len(tensor.shape)) if dim not in order)
        read = tensor.reordered((*order, *rest))
        whole = read.flat(0, math.prod(tensor.shape)).numpy().astype(np.int64)
        ids.append(whole if at == packed else whole.reshape(-1, _length(axes, tensor.shape)))
    mask = None
    if match.mask is not None:
        tensor = Assembled(match.mask, loads[1 - packed])
        axes = match.mask.axes
        order = _tokens_first(axes, tensor.shape) if axes is not None else tuple(range(len(tensor.shape)))
        rest = tuple(dim for dim in range(len(tensor.shape)) if dim not in order)
        values = tensor.reordered((*order, *rest)).flat(0, math.prod(tensor.shape)).numpy() != 0
        if values.size != ids[1 - packed].size:
            raise ComparisonError(f"the attention mask has shape {list(tensor.shape)}, which is not that of input_ids")
        mask = values.reshape(ids[1 - packed].shape)
    bounds = [0, len(ids[packed])]
    if match.sequences is not None:
        bounds = [int(one) for one in loads[packed](match.sequences).reshape(-1).tolist()]
    return pair_tokens(ids[packed], bounds, ids[1 - packed], mask)


def _tokens_first(axes: tuple[Dim, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of tokens: `t`, or batch and sequence, in that order."""
    if len(axes) != len(shape):
        raise ComparisonError(f"{len(axes)} axes are named, the tensor has shape {list(shape)}")
    names = [axis.names for axis in axes]
    for wanted in ([(TOKENS,)], [(BATCH, SEQUENCE)], [(BATCH,), (SEQUENCE,)], [(SEQUENCE,)]):
        if all(one in names for one in wanted):
            return tuple(names.index(one) for one in wanted)
    raise ComparisonError(f"no axis of tokens among {' '.join(axis.text for axis in axes)!r}")


def _length(axes: tuple[Dim, ...], shape: tuple[int, ...]) -> int:
    """Length of the padded sequences."""
    names = [axis.names for axis in axes]
    if (SEQUENCE,) not in names:
        raise ComparisonError("the input_ids of a padded batch need the axes b and s, apart")
    return shape[names.index((SEQUENCE,))]


def _inner(
    axes: tuple[tuple[Dim, ...], tuple[Dim, ...]],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    tokens: Sequence[tuple[int, ...]],
) -> list[Reading]:
    """One order for the axes that are not tokens."""
    hidden = tuple(tuple(Dim(()) if dim in tokens[at] else axis for dim, axis in enumerate(axes[at])) for at in (0, 1))
    sizes = tuple(tuple(1 if dim in tokens[at] else size for dim, size in enumerate(shapes[at])) for at in (0, 1))
    return list(common(hidden[0], hidden[1], (sizes[0], sizes[1])))
