"""Lay two matched units side by side, a few rows at a time."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch

from trimtab.compare._measured import Floats
from trimtab.compare._sides import Ints
from trimtab.compare.layout import Layout
from trimtab.compare.layout.views import ViewPair, view_pair
from trimtab.compare.match import Pair
from trimtab.compare.measure import Chunk, as_rows, is_exact
from trimtab.numerics.dtypes import coarser
from trimtab.numerics.pair import channel_square_sums
from trimtab.numerics.ulp import max_ulp_finite
from trimtab.trace import Trace

CHUNK_ELEMENTS = 4 << 20
FUSED_ELEMENTS = 16 << 20  # of the fused pass, which reads what is stored without copies but for figures of rows
FUSED_ROWS = 1 << 20
COPIED_ELEMENTS = 1 << 18  # what is put together is copied: a piece that stays in the cache
SAMPLE_ELEMENTS = 4 << 20
QUANTILES = (0.5, 0.9, 0.99, 0.999)


class Aligned:
    """A pair with its tensors, memory-mapped and read in chunks; what `verdict.Probe` asks for is measured here."""

    def __init__(self, pair: Pair, reference: Trace, candidate: Trace) -> None:
        self.pair = pair
        self._sides = (reference, candidate)
        self._load = functools.lru_cache(maxsize=4)(self._read)
        self.views: ViewPair | None = None
        if pair.layouts is not None:
            self._lay_out(pair, pair.layouts)
            return
        first = [self._load(0, pair.reference_ids[0]), self._load(1, pair.candidate_ids[0])]
        self.dtypes = (first[0].dtype, first[1].dtype)
        shapes = (tuple(first[0].shape), tuple(first[1].shape))
        if pair.positions is None:
            self.shapes: tuple[tuple[int, ...], tuple[int, ...]] = shapes
            rows = as_rows(first[0])
            self.rows, self.width = rows.shape
            self._offsets: list[int] = [0]
        else:
            self.rows = len(pair.positions)
            self.shapes = ((self.rows, *shapes[0][1:]), (self.rows, *shapes[1][1:]))
            self.width = _flat_rows(first[0]).shape[1]
            lengths = [len(segment.reference_rows) for segment in pair.segments]
            self._offsets = [0, *accumulate(lengths)][:-1]

    def _lay_out(self, pair: Pair, layouts: tuple[Layout, Layout]) -> None:
        """Read both sides out of their pieces.

        Raises:
            ComparisonError: the pieces do not fit together, or the axes of the two sides do not pair up.
        """
        self.views = view_pair(layouts, (self._sides[0].tensor, self._sides[1].tensor), pair.tokens)
        self.dtypes = (self.views.reference.dtype, self.views.candidate.dtype)
        self.shapes = (self.views.reference.shape, self.views.candidate.shape)
        width = self.shapes[0][-1] if self.shapes[0] else 1
        self.rows = math.prod(self.shapes[0]) // width if width else 0
        self.width = width * (2 if self.dtypes[0].is_complex else 1)

    @property
    def fits(self) -> bool:
        """Whether the two sides have one shape."""
        return self.shapes[0] == self.shapes[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pair, for coordinates; a complex element counts as two."""
        shape = self.shapes[0]
        return (*shape, 2) if self.dtypes[0].is_complex else shape

    def chunks(self) -> Iterator[Chunk]:
        """Yield rows of both sides in order, as `[rows, width]` views or gathered copies."""
        elements = CHUNK_ELEMENTS if self.views is None else min(CHUNK_ELEMENTS, COPIED_ELEMENTS)
        return self._cut(max(1, elements // max(self.width, 1)))

    def fused(self) -> Iterator[Chunk]:
        """Yield the chunks of the fused pass: larger ones where it reads both sides as they are stored."""
        if self.views is not None or self.pair.positions is not None or self.dtypes[0] != self.dtypes[1]:
            return self.chunks()
        return self._cut(max(1, min(FUSED_ELEMENTS // max(self.width, 1), FUSED_ROWS)))

    def _cut(self, step: int) -> Iterator[Chunk]:
        for begin in range(0, self.rows, step):
            yield self.between(begin, min(begin + step, self.rows))

    def between(self, begin: int, end: int) -> Chunk:
        """Return the rows `[begin, end)` of both sides."""
        if self.views is not None:
            width = self.shapes[0][-1] if self.shapes[0] else 1
            sides = (view.flat(begin * width, end * width) for view in self.views[:2])
            ours, theirs = (as_rows(side.reshape(-1, width)) for side in sides)
            return Chunk(begin, ours, theirs)
        if self.pair.positions is None:
            reference = as_rows(self._load(0, self.pair.reference_ids[0]))
            candidate = as_rows(self._load(1, self.pair.candidate_ids[0]))
            return Chunk(begin, reference[begin:end], candidate[begin:end])
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number in range(bisect.bisect_right(self._offsets, begin) - 1, len(self._offsets)):
            offset, segment = self._offsets[number], self.pair.segments[number]
            if offset >= end:
                break
            cut = slice(max(begin - offset, 0), end - offset)
            reference = _take(self._load(0, segment.reference_id), segment.reference_rows[cut])
            parts.append((reference, _take(self._load(1, segment.candidate_id), segment.candidate_rows[cut])))
        if len(parts) == 1:
            return Chunk(begin, *parts[0])
        return Chunk(begin, torch.cat([one[0] for one in parts]), torch.cat([one[1] for one in parts]))

    def window(self, row: int, elements: int = SAMPLE_ELEMENTS) -> Chunk:
        """Return a contiguous run of rows around `row`; everything when it fits."""
        count = min(self.rows, max(1, elements // max(self.width, 1)))
        begin = min(max(0, row - count // 2), self.rows - count)
        return self.between(begin, begin + count)

    def channels(self) -> tuple[Floats, Floats]:
        """Per channel: slope - 1 of what varies over the rows, and mean error over the channel's rms.

        The slope is that of centred columns: an error of something all rows share, such as a massive channel, is not
        a scale error of the tensor.
        """
        product, square, error, total = (np.zeros(self.width) for _ in range(4))
        for chunk in self.chunks():
            reference, candidate = (side.double().numpy() for side in chunk[1:])
            good = np.isfinite(reference) & np.isfinite(candidate)
            reference = np.where(good, reference, 0)
            difference = np.where(good, candidate, 0) - reference
            product += np.einsum("rc,rc->c", difference, reference)
            square += np.einsum("rc,rc->c", reference, reference)
            error += difference.sum(axis=0)
            total += reference.sum(axis=0)
        varying = square - total**2 / self.rows
        varying[varying <= 1e-9 * square] = np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            return (product - error * total / self.rows) / varying, error / np.sqrt(self.rows * square)

    def channel_rms(self, most: int | None = None) -> Floats:
        """The reference's rms by channel, over all rows or over at most `most` evenly spread ones."""
        step = 1 if most is None else max(1, -(-self.rows // most))
        square, count = np.zeros(self.width), 0
        for chunk in self.chunks():
            rows = chunk.reference[-chunk.start % step :: step]
            square += channel_square_sums(rows)
            count += len(rows)
        return np.sqrt(square / max(count, 1))

    def max_ulp(self) -> int | None:
        """Largest distance in representable steps of the coarser dtype; None when a side is not finite."""
        dtype = coarser(*(side.to_real() if side.is_complex else side for side in self.dtypes))
        worst = 0
        for chunk in self.chunks():
            found = max_ulp_finite(chunk.reference, chunk.candidate, dtype)
            if found is None:
                return None
            worst = max(worst, found)
        return worst

    def quantiles(self) -> tuple[float, ...]:
        """|a - r| at 0.5, 0.9, 0.99 and 0.999; above 4 M elements, of evenly spread rows."""
        step = max(1, -(-self.rows * self.width // SAMPLE_ELEMENTS))
        gaps = []
        for chunk in self.chunks():
            rows = slice(-chunk.start % step, None, step)
            gap = (chunk.candidate[rows].double() - chunk.reference[rows].double()).abs()
            gaps.append(gap[gap.isfinite()].numpy())
        every = np.concatenate(gaps) if gaps else np.zeros(0)
        return tuple(float(value) for value in np.quantile(every, QUANTILES)) if every.size else (0.0,) * len(QUANTILES)

    def _read(self, side: int, record_id: int) -> torch.Tensor:
        return self._sides[side].tensor(record_id)

    @property
    def comparable(self) -> bool:
        """Whether both sides are of one kind: exact, real or complex."""
        return len({(is_exact(dtype), dtype.is_complex) for dtype in self.dtypes}) == 1


def _flat_rows(tensor: torch.Tensor) -> torch.Tensor:
    """View a record of rows as `[rows, width]`."""
    return as_rows(tensor.reshape(tensor.shape[0], -1))


def _take(tensor: torch.Tensor, rows: Ints) -> torch.Tensor:
    """Select rows: a view when they are contiguous, else a copy."""
    flat = _flat_rows(tensor)
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((rows[1:] - rows[:-1] == 1).all()):
        return flat[int(rows[0]) : int(rows[-1]) + 1]
    return flat[torch.from_numpy(rows)]
