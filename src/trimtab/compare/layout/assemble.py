"""Reading a tensor out of its pieces, a stretch at a time; nothing is put together as a whole.

Every axis is a list of runs: a stretch of it, and where one rank holds that. A stretch of elements is a few boxes, a
box a product of runs, and each of those is copied from the mapped record that holds it.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from trimtab.compare.dims import TOKENS, Split
from trimtab.compare.layout._types import Coordinates, Layout, Piece, Run, spelled
from trimtab.compare.layout.parts import part_runs
from trimtab.errors import ComparisonError

Load = Callable[[int], torch.Tensor]
At = Mapping[str, int]


class Assembled:
    """A tensor made of pieces.

    Args:
        layout: its pieces.
        load: returns the tensor of a record, mapped.
        order: the axes in the order in which elements are read; as they are stored unless given.

    Raises:
        ComparisonError: the pieces do not fit together.
    """

    def __init__(self, layout: Layout, load: Load, order: Sequence[int] | None = None) -> None:
        self.layout = layout
        self._load = load
        self._tensors: dict[int, torch.Tensor] = {}
        self._ndim = _check_shapes(layout)
        self._runs = [self._axis_runs(dim) for dim in range(self._ndim)]
        self._starts = [[run.start for run in runs] for runs in self._runs]
        self.shape = tuple(runs[-1].stop for runs in self._runs)
        self.order = tuple(range(self._ndim)) if order is None else tuple(order)
        self.dtype = self._tensor(layout.pieces[0]).dtype
        self._terms = _terms(layout)
        self._divisor = _divisor(layout)
        self.owners_at = tuple(self._terms)
        """Coordinates of the owners that `owners` numbers."""
        self._numbers = {at: number for number, at in enumerate(self._terms)}
        self._check_dtypes()

    def reordered(self, order: Sequence[int]) -> Assembled:
        """The same tensor, read with its axes in another order."""
        return Assembled(self.layout, self._load, order)

    @property
    def read_shape(self) -> tuple[int, ...]:
        """The shape in reading order."""
        return tuple(self.shape[dim] for dim in self.order)

    def flat(self, begin: int, end: int) -> torch.Tensor:
        """Elements `[begin, end)` in reading order: a view where one record holds them side by side, else a copy."""
        found = list(boxes(self.read_shape, begin, end))
        if len(found) == 1 and self._divisor == 1:
            parts = list(self._parts(*found[0][1:]))
            if len(parts) == 1 and len(parts[0][0]) == 1:
                view = self._tensor(parts[0][0][0])[parts[0][1]].permute(self.order)
                if view.is_contiguous():
                    return view.reshape(-1)
        out = torch.empty(end - begin, dtype=self.dtype)
        for at, low, high in found:
            sizes = [top - bottom for bottom, top in zip(low, high, strict=True)]
            target = out[at : at + math.prod(sizes)].view(sizes)
            for terms, inside, where in self._parts(low, high):
                self._copy(target[where], terms, inside)
        return out

    def owners(self, begin: int, end: int) -> npt.NDArray[np.int32]:
        """Who held the elements `[begin, end)`: an index into `owners_at` for each."""
        out = np.empty(end - begin, dtype=np.int32)
        for at, low, high in boxes(self.read_shape, begin, end):
            sizes = [top - bottom for bottom, top in zip(low, high, strict=True)]
            target = out[at : at + math.prod(sizes)].reshape(sizes)
            for terms, _, where in self._parts(low, high):
                target[where] = self._numbers[_cut_only(self.layout, terms[0].at)]
        return out

    def holders(self, owner: int) -> tuple[Piece, ...]:
        """The pieces of an owner: one, or the terms of a sum."""
        return self._terms[self.owners_at[owner]]

    def _copy(self, target: torch.Tensor, terms: tuple[Piece, ...], inside: tuple[slice, ...]) -> None:
        views = [self._tensor(piece)[inside].permute(self.order) for piece in terms]
        if len(views) == 1 and self._divisor == 1:
            target.copy_(views[0])
            return
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            wide = torch.int64
        total = torch.zeros(target.shape, dtype=wide)
        for view in views:
            total += view.to(wide)
        target.copy_(total / self._divisor if self._divisor > 1 else total)

    def _parts(
        self, low: Sequence[int], high: Sequence[int]
    ) -> Iterator[tuple[tuple[Piece, ...], tuple[slice, ...], tuple[slice, ...]]]:
        """For a box in reading order: pieces, the slices of their records, and the slices of the box."""
        found: list[list[tuple[Coordinates, slice, slice]]] = [[] for _ in range(self._ndim)]
        for place, dim in enumerate(self.order):
            runs = self._runs[dim]
            for number in range(bisect.bisect_right(self._starts[dim], low[place]) - 1, len(runs)):
                run = runs[number]
                if run.start >= high[place]:
                    break
                start, stop = max(run.start, low[place]), min(run.stop, high[place])
                if start >= stop:
                    continue
                local = slice(run.local + start - run.start, run.local + stop - run.start)
                found[dim].append((run.at, local, slice(start - low[place], stop - low[place])))
        for parts in itertools.product(*found):
            at = tuple(sorted(itertools.chain.from_iterable(part[0] for part in parts)))
            if at not in self._terms:
                raise ComparisonError(f"no rank holds the piece at {spelled(at)}")
            yield self._terms[at], tuple(part[1] for part in parts), tuple(parts[dim][2] for dim in self.order)

    def _tensor(self, piece: Piece) -> torch.Tensor:
        found = self._tensors.get(piece.record_id)
        if found is None:
            found = self._tensors[piece.record_id] = self._load(piece.record_id)
        return found

    def _check_dtypes(self) -> None:
        first = self.layout.pieces[0]
        for piece in self.layout.pieces[1:]:
            if (dtype := self._tensor(piece).dtype) != self.dtype:
                raise ComparisonError(
                    f"the pieces have several dtypes: {self.dtype} on {first.text}, {dtype} on {piece.text}"
                )

    def _axis_runs(self, dim: int) -> list[Run]:
        """The runs of one axis, in order."""
        layout = self.layout
        splits = () if layout.axes is None else tuple(one for one in layout.axes[dim].splits if one.cuts)
        values = {axis: sorted({dict(piece.at)[axis] for piece in layout.pieces}) for axis, _ in layout.pieces[0].at}
        splits = tuple(one for one in splits if one.coordinate in values)
        mine = {one.coordinate for one in splits}
        lengths: dict[Coordinates, tuple[int, Piece]] = {}
        for piece in layout.pieces:
            at = tuple(pair for pair in piece.at if pair[0] in mine)
            known = lengths.setdefault(at, (piece.shape[dim], piece))
            if known[0] != piece.shape[dim]:
                raise ComparisonError(
                    f"the pieces do not fit: {known[1].text} has shape {list(known[1].shape)}, {piece.text} "
                    f"{list(piece.shape)}, and the dims {str(layout.dims)!r} cut axis {dim} over "
                    f"{', '.join(sorted(mine)) or 'nothing'}"
                )
        if layout.axes is not None and layout.axes[dim].parts:
            return part_runs(layout.axes[dim], values, {at: size for at, (size, _) in lengths.items()})
        packed = layout.axes is not None and layout.axes[dim].names == (TOKENS,)
        joiner = _Joiner(values, {at: size for at, (size, _) in lengths.items()}, self._sequences if packed else _none)
        return joiner.join(splits, {})

    def _sequences(self, at: At) -> list[int] | None:
        """Bounds of the sequences on the ranks at some coordinates; None where nobody recorded them."""
        for where, record_id in self.layout.sequences:
            if all(at.get(axis, index) == index for axis, index in where):
                return [int(bound) for bound in self._load(record_id).reshape(-1).tolist()]
        return None


class _Joiner:
    """Joins the stretches of ranks to an axis."""

    def __init__(
        self,
        values: Mapping[str, Sequence[int]],
        lengths: Mapping[Coordinates, int],
        sequences: Callable[[At], list[int] | None],
    ) -> None:
        self._values, self._lengths, self._sequences = values, lengths, sequences

    def join(self, splits: Sequence[Split], at: At) -> list[Run]:
        """Join over the splits that are left, the rightmost first."""
        if not splits:
            where = tuple(sorted(at.items()))
            if where not in self._lengths:
                raise ComparisonError(f"no rank holds the piece at {spelled(where)}")
            return [Run(0, self._lengths[where], 0, where)]
        split, rest = splits[0], splits[1:]
        parts = [self.join(rest, {**at, split.coordinate: index}) for index in self._values[split.coordinate]]
        bounds = self._sequences(at) if split.coordinate == "cp" else None
        if len(parts) == 1 or (split.how != "zigzag" and bounds is None):
            return _chain(parts)
        return _chain(list(self._interleaved(parts, split, bounds)))

    def _interleaved(self, parts: list[list[Run]], split: Split, bounds: list[int] | None) -> Iterator[list[Run]]:
        """Cut every rank's stretch by sequence and put the chunks of each sequence in order."""
        count, total = len(parts), sum(part[-1].stop for part in parts)
        chunks = 2 * count if split.how == "zigzag" else count
        bounds = [0, total] if bounds is None else bounds
        if bounds[0] != 0 or bounds[-1] > total or any(b < a for a, b in itertools.pairwise(bounds)):
            raise ComparisonError(f"cu_seqlens {_short(bounds)} do not cut the {total} tokens of {count} ranks")
        if (total - bounds[-1]) % chunks == 0:  # padding behind the last sequence is one more
            bounds = [*bounds, total]
        for start, stop in itertools.pairwise(bounds):
            if (stop - start) % chunks or start % count:
                raise ComparisonError(
                    f"a sequence of {stop - start} tokens cannot be cut into {chunks} equal chunks ({split.axis} of "
                    f"{count} ranks{', zigzag' * (split.how == 'zigzag')})"
                )
            size, local = (stop - start) // chunks, start // count
            for chunk in range(chunks):
                rank, half = (chunk, 0) if chunk < count else (2 * count - 1 - chunk, 1)
                begin = local + half * size
                if begin + size > parts[rank][-1].stop:
                    raise ComparisonError(f"the ranks of {split.axis} hold unequal shares of {total} tokens")
                yield _cut(parts[rank], begin, begin + size)
        for part in parts:  # unless it cannot be cut like one
            yield _cut(part, bounds[-1] // count, part[-1].stop)


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Cut the elements `[begin, end)` of a row-major tensor into boxes.

    Yields:
        Where the box begins among the elements asked for, its lower and its upper corner.
    """
    if end <= begin:
        return
    if not shape:
        yield 0, [], []
        return
    inner = math.prod(shape[1:])
    if inner == 1 or (begin % inner == 0 and end % inner == 0):
        yield 0, [begin // inner, *(0 for _ in shape[1:])], [end // inner, *shape[1:]]
        return
    at = begin
    while at < end:
        row, offset = divmod(at, inner)
        if offset == 0 and end - at >= inner:
            stop = end // inner * inner
            yield at - begin, [row, *(0 for _ in shape[1:])], [stop // inner, *shape[1:]]
        else:
            stop = min(end, (row + 1) * inner)
            for start, low, high in boxes(shape[1:], offset, stop - row * inner):
                yield at - begin + start, [row, *low], [row + 1, *high]
        at = stop


def _check_shapes(layout: Layout) -> int:
    """Return the number of axes.

    Raises:
        ComparisonError: the records have several, or dims name another number.
    """
    first = layout.pieces[0]
    for piece in layout.pieces:
        if len(piece.shape) != len(first.shape):
            raise ComparisonError(
                f"the pieces do not fit: {first.text} has shape {list(first.shape)}, {piece.text} {list(piece.shape)}"
            )
    if layout.axes is not None and len(layout.axes) != len(first.shape):
        raise ComparisonError(
            f"dims {str(layout.dims)!r} name {len(layout.axes)} axes, the tensor of {first.text} has shape "
            f"{list(first.shape)}; correct them with dims="
        )
    return len(first.shape)


def _terms(layout: Layout) -> dict[Coordinates, tuple[Piece, ...]]:
    """Pieces by the coordinates that cut; several where they are terms of a sum."""
    found: dict[Coordinates, list[Piece]] = {}
    for piece in layout.pieces:
        found.setdefault(_cut_only(layout, piece.at), []).append(piece)
    return {at: tuple(pieces) for at, pieces in sorted(found.items())}


def _divisor(layout: Layout) -> int:
    """By what a share or sum of terms is divided: the number of ranks along axes of which it is the mean."""
    if layout.dims is None:
        return 1
    means = {one.coordinate for one in layout.dims.splits() if one.how == "mean" or one.scaled}
    return math.prod(len({dict(piece.at).get(axis) for piece in layout.pieces}) for axis in means)


def _cut_only(layout: Layout, at: Coordinates) -> Coordinates:
    if layout.dims is None:
        return ()
    cutting = {axis for axis, _ in at if (split := layout.dims.split_of(axis)) is not None and split.cuts}
    return tuple(pair for pair in at if pair[0] in cutting)


def _chain(parts: Sequence[Sequence[Run]]) -> list[Run]:
    """Put stretches one behind the other; neighbours that one rank holds in one go are joined."""
    found: list[Run] = []
    at = 0
    for run in itertools.chain.from_iterable(parts):
        size = run.stop - run.start
        last = found[-1] if found else None
        if last is not None and last.at == run.at and last.local + last.stop - last.start == run.local:
            found[-1] = Run(last.start, last.stop + size, last.local, last.at)
        elif size:
            found.append(Run(at, at + size, run.local, run.at))
        at += size
    return found or [Run(0, 0, 0, parts[0][0].at)]


def _cut(runs: Sequence[Run], begin: int, end: int) -> list[Run]:
    """The part `[begin, end)` of an axis, counted from 0."""
    found = []
    for run in runs:
        start, stop = max(run.start, begin), min(run.stop, end)
        if start < stop:
            found.append(Run(start - begin, stop - begin, run.local + start - run.start, run.at))
    return found


def _none(_: At) -> None:
    return None


def _short(bounds: Sequence[int]) -> str:
    return str(list(bounds[:6])) if len(bounds) <= 6 else f"[{', '.join(map(str, bounds[:5]))}, ..., {bounds[-1]}]"
