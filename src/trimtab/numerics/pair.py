"""The one pass that compares two tensors."""

from __future__ import annotations

import math
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.numerics._layout import CODES, Rectangle, kernels, plain, rectangles, table_address
from trimtab.numerics._sums import Sums, add_torch, largest, row_figures, scaled_figures, wide_integers, widen
from trimtab.numerics.dtypes import coarser, dtype_name, is_floating, round_to

Array = np.ndarray[Any, np.dtype[np.float64]]
Engine = Literal["numba", "torch"]

_LIMIT = {"numba": 1 << 24, "torch": 1 << 20}
_CHANNEL_LIMIT = 1 << 20
_THREAD_WORTH = 1 << 18
_WHOLE = 1 << 24
_WHOLE_ROWS = 1 << 20
_WIDE_RANGE = {torch.float64, torch.complex128}
"""Dtypes whose squares float64 cannot always hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairStats:
    """How a candidate differs from a reference; r and c are their elements, rows run over the last dimension.

    Sums are float64. Every figure is over the pairs that are finite on both sides; what is not finite is counted and
    compared by position. Means over no element are 0, so two empty tensors are identical.
    """

    numel: int
    rows: int
    """Rows over the last dimension (a 0-d or 1-d tensor is one row)."""
    mae: float
    """`mean |c - r|`; 0 is equality. Modulus for complex tensors, here and below."""
    rmse: float
    """`sqrt(mean |c - r|^2)`."""
    max_abs: float
    """`max |c - r|`."""
    max_abs_index: tuple[int, ...]
    """Where the largest difference is (the first of equal ones); empty for a 0-d or an empty tensor."""
    max_abs_reference: float
    """The reference's value there (an int for integer tensors, the modulus for complex ones)."""
    max_abs_candidate: float
    rel_l2: float
    """`|c - r| / |r|` over the whole tensor; 0 for two zero tensors, inf when only the reference is zero."""
    rel_diff: float
    """`|c - r|^2 / (|r|^2 + |c|^2)`, between 0 and 2."""
    cosine: float
    """Mean of the rows' cosines."""
    cosine_min: float
    cosine_flat: float
    """Cosine of the whole tensors as vectors."""
    slope: float
    """Least squares factor `<r, c> / <r, r>` of `c ~ slope r`; 1 for two zero tensors, inf for a zero reference."""
    mean_reference: float
    """Mean of r (modulus of the mean for complex tensors)."""
    mean_candidate: float
    mean_error: float
    """`mean (c - r)`, signed, summed as differences (modulus of it for complex tensors)."""
    unequal: int | None
    """Positions whose values differ; equal NaN, equal Inf and the two zeros count as equal. None: not counted."""
    exact: bool
    """True when both sides are integers or booleans: equality is then the only criterion."""
    nan_reference: int
    nan_candidate: int
    inf_reference: int
    inf_candidate: int
    nonfinite_mismatches: int
    """Positions where one side is NaN, +Inf or -Inf and the other is not the same."""
    row_error: Array
    """`|c - r|` of each row, [rows]; empty when per_row is False, like the other row arrays."""
    row_norm: Array
    """`|r|` of each row."""
    row_rel_l2: Array
    """`row_error / row_norm`: 0 for two zero rows, inf for a zero reference row only."""
    row_cosine: Array
    """Cosine of each row: 1 for two zero rows, 0 for one zero row."""
    channel_rms: Array
    """`sqrt(mean over rows |c - r|^2)` of each position of the last dimension; empty beyond 2^20 channels."""
    dtype_reference: str
    dtype_candidate: str
    engine: str
    accumulator: str = "float64"

    @property
    def nonfinite_match(self) -> bool:
        """True when NaN, +Inf and -Inf are at the same positions on both sides."""
        return self.nonfinite_mismatches == 0

    @property
    def identical(self) -> bool:
        """True when no position differs in value."""
        return self.nonfinite_match and self.max_abs == 0 if self.unequal is None else self.unequal == 0


def compare_pair(
    reference: Tensor,
    candidate: Tensor,
    *,
    engine: Engine = "numba",
    per_row: bool = True,
    count_unequal: bool = True,
) -> PairStats:
    """Compare two tensors of one shape, as they are stored, in one pass over their rows.

    Any dtypes may meet: values are widened exactly to float64 block by block (64-bit integers are compared as
    integers), so memory does not grow with the tensors beyond the per-row arrays.

    Args:
        reference: the trusted tensor, any shape, dtype and layout.
        candidate: the tensor under test, same shape.
        engine: "numba" reads CPU memory at about its bandwidth; "torch" runs on the tensors' own device and agrees
            to 1e-12. Complex tensors, 64-bit integers and CUDA tensors always take "torch"; the result says which ran.
        per_row: keep the per-row arrays (float64, one number per row each).
        count_unequal: count the positions that differ; without, a large pair takes about a tenth less time.

    Returns:
        The statistics; see `PairStats`.

    Raises:
        InputError: when the shapes differ, or a tensor is sparse, meta or of a dtype without values.
    """
    return _compare(reference, candidate, engine=engine, per_row=per_row, count=count_unequal, common=None)


def compare_pair_coarser(
    reference: Tensor, candidate: Tensor, *, engine: Engine = "numba", per_row: bool = True
) -> PairStats:
    """Compare two tensors after rounding both once to the coarser of their dtypes.

    What `compare_pair` of a float32 and a bfloat16 tensor shows includes the storage rounding of the coarser side;
    here that rounding is on both sides, so 0 means "the same up to storage". Arguments and result as `compare_pair`;
    the result's dtypes are the common one. Two exact dtypes are compared as they are, by value.
    """
    for one in (reference, candidate):
        if not isinstance(one, Tensor):
            raise InputError(f"got {type(one).__name__}; expected a torch.Tensor")
    rounded = is_floating(reference.dtype) or is_floating(candidate.dtype)
    common = coarser(reference.dtype, candidate.dtype) if rounded else None
    return _compare(reference, candidate, engine=engine, per_row=per_row, count=True, common=common)


def _compare(
    reference: Tensor, candidate: Tensor, *, engine: Engine, per_row: bool, count: bool, common: torch.dtype | None
) -> PairStats:
    """Check, run the engine over rectangles, finish; again with a scale when float64 squares left their range."""
    left, right = plain(reference), plain(candidate)
    names = (dtype_name(common or reference.dtype), dtype_name(common or candidate.dtype))
    if left.shape != right.shape:
        raise InputError(
            f"got reference {tuple(reference.shape)} {dtype_name(reference.dtype)} and candidate "
            f"{tuple(candidate.shape)} {dtype_name(candidate.dtype)}; expected equal shapes (no broadcasting)"
        )
    if engine not in _LIMIT:
        raise InputError(f"got engine={engine!r}; expected 'numba' or 'torch'")
    chosen = _choose(engine, left, right)
    wide = bool({left.dtype, right.dtype} & _WIDE_RANGE)
    small = left.numel() < _THREAD_WORTH or (left.numel() <= _WHOLE and not wide and _threads() == 1)
    if chosen == "numba" and common is None and small and left.numel():
        found = _small(left, right, per_row, count, names)
        if found is not None:
            return found
    watch = wide and common in (None, *_WIDE_RANGE)
    total = _run(left, right, chosen, per_row, count, common, scale=1.0, watch=watch)
    if total.left_range() and wide:
        scale = _rescue_scale(left, right)
        if scale != 1.0:
            counts = total.counts  # a small difference may be 0 at another scale
            total = _run(left, right, chosen, per_row, count, common, scale=scale, watch=watch)
            total.counts = counts
    place = largest(total, left, right, common)
    suspects = np.concatenate(total.suspects) if total.suspects else np.zeros(0, np.int64)
    rescued = None
    if suspects.size:
        rescued = scaled_figures(left, right, suspects)
        total.cosine_sum += float(rescued.cosine.sum())
        total.cosine_min = float(rescued.cosine.min(initial=total.cosine_min))
    found = _finish(left, right, total, place, names=names, engine=chosen, count=count)
    if rescued is not None and per_row:  # the arrays are this call's own
        for array, better in zip(
            (found.row_error, found.row_norm, found.row_rel_l2, found.row_cosine), rescued, strict=True
        ):
            array[suspects] = better
    return found


def _small(left: Tensor, right: Tensor, per_row: bool, count: bool, names: tuple[str, str]) -> PairStats | None:
    """Compare two tensors of moderate size in one call; None when layout, rows or range need the general way."""
    width = left.shape[-1] if left.dim() else 1
    if not (
        left.is_contiguous() and right.is_contiguous() and left.is_cpu and right.is_cpu and width <= _CHANNEL_LIMIT
    ):
        return None
    rows = left.numel() // width
    if rows > _WHOLE_ROWS:
        return None
    sums, counts, where = np.zeros(9), np.zeros(7, np.int64), np.array([-1, 0, 0], np.int64)
    row_sums, figures, channels = np.zeros((rows, 4)), np.empty((4, rows)), np.zeros(width)
    item, item_c = left.element_size(), right.element_size()
    kernels().whole_pair(
        left.data_ptr(), CODES[left.dtype], item, item * width, table_address(left.dtype),
        right.data_ptr(), CODES[right.dtype], item_c, item_c * width, table_address(right.dtype),
        rows, width, count, row_sums, figures, channels, sums, counts, where,
    )  # fmt: skip
    if _WIDE_RANGE & {left.dtype, right.dtype} and not (row_sums[:, :3].min() > 1e-280 and sums[3:6].max() < 1e280):
        return None
    absolute, total, error, dd, rr, cc, rc, cosines, cosine_min = sums.tolist()
    nan_r, inf_r, nan_c, inf_c, mismatched, left_out, unequal = counts.tolist()
    top, row, column = where.tolist()
    flat = row * width + column
    finite = max(left.numel() - left_out, 1)
    if not per_row:
        figures = np.empty((4, 0))
    return PairStats(
        numel=left.numel(),
        rows=rows,
        mae=absolute / finite,
        rmse=math.sqrt(dd / finite),
        max_abs=struct.unpack("d", struct.pack("q", top))[0],
        max_abs_index=_unravel(flat, left.shape),
        max_abs_reference=_element(left, flat),
        max_abs_candidate=_element(right, flat),
        rel_l2=math.sqrt(dd) / math.sqrt(rr) if rr > 0 else (math.inf if dd > 0 else 0.0),
        rel_diff=dd / (rr + cc) if rr + cc > 0 else 0.0,
        cosine=cosines / rows,
        cosine_min=cosine_min,
        cosine_flat=_cosine(rr, cc, rc),
        slope=rc / rr if rr > 0 else (math.inf if cc > 0 else 1.0),
        mean_reference=total / finite,
        mean_candidate=(total + error) / finite,
        mean_error=error / finite,
        nan_reference=nan_r,
        inf_reference=inf_r,
        nan_candidate=nan_c,
        inf_candidate=inf_c,
        nonfinite_mismatches=mismatched,
        unequal=mismatched + unequal if count else None,
        exact=not is_floating(left.dtype) and not is_floating(right.dtype),
        row_error=figures[0],
        row_norm=figures[1],
        row_rel_l2=figures[2],
        row_cosine=figures[3],
        channel_rms=channels,
        dtype_reference=names[0],
        dtype_candidate=names[1],
        engine="numba",
    )


def _cosine(rr: float, cc: float, rc: float) -> float:
    if rr > 0 and cc > 0:
        return min(max(rc / math.sqrt(rr) / math.sqrt(cc), -1.0), 1.0)
    return 1.0 if rr == cc else 0.0


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return tuple(reversed(index))


def _element(tensor: Tensor, flat: int) -> float:
    """A stored value; integers stay integers."""
    value = tensor.view(-1)[flat].item()
    return int(value) if isinstance(value, bool) else value


def channel_square_sums(rows: Tensor) -> Array:
    """Sum of the squares of each column's finite elements, float64 [width].

    Args:
        rows: `[rows, width]`, real, any dtype and layout.
    """
    rows = _readable(plain(rows))
    out = np.zeros(rows.shape[1])
    kernels().channel_squares(
        rows.data_ptr(), CODES[rows.dtype], rows.element_size(), rows.stride(0) * rows.element_size(),
        rows.shape[0], rows.shape[1], table_address(rows.dtype), out,
    )  # fmt: skip
    return out


def _choose(engine: Engine, left: Tensor, right: Tensor) -> Engine:
    """The engine that can read both sides."""
    if left.is_complex() or right.is_complex() or left.is_cuda or right.is_cuda:
        return "torch"
    return "torch" if wide_integers(left.dtype, right.dtype) else engine


def _run(
    left: Tensor,
    right: Tensor,
    engine: Engine,
    per_row: bool,
    count: bool,
    common: torch.dtype | None,
    *,
    scale: float,
    watch: bool,
) -> Sums:
    """Accumulate over all rectangles."""
    width = left.shape[-1] if left.dim() else 1
    rows = math.prod(left.shape[:-1])
    total = Sums(
        rows=rows, channels=width if width <= _CHANNEL_LIMIT else 0, keep_rows=per_row, scale=scale, watch=watch
    )
    if left.numel() == 0:  # rows of no element are zero rows
        total.cosine_sum = float(rows)
        total.kept.cosine[:] = 1.0
    for part in rectangles(left, right, _LIMIT[engine]):
        if common is not None:
            rounded = round_to(part.reference, common), round_to(part.candidate, common)
            part = Rectangle(*rounded, part.row, part.column)
        total.begin(part)
        if engine == "torch":
            add_torch(total, part)
        else:
            _add_numba(total, part, count)
        if part.column + part.reference.shape[1] == width:
            total.end()
    return total


def _readable(tensor: Tensor) -> Tensor:
    """On the CPU with adjacent elements in a row."""
    tensor = tensor.to("cpu")
    return tensor if tensor.shape[1] == 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _add_numba(total: Sums, part: Rectangle, count: bool) -> None:
    """Reduce one rectangle with the compiled kernel, split over threads by rows or, for few rows, by columns."""
    reference, candidate = _readable(part.reference), _readable(part.candidate)
    num_rows, num_columns = reference.shape
    threads = 1
    if reference.numel() >= _THREAD_WORTH:
        threads = _threads()
    by_rows = num_rows >= threads
    size = num_rows if by_rows else num_columns
    bounds = [size * i // threads for i in range(threads + 1)]
    jobs = [_Job(total, part, reference, candidate, bounds[i], bounds[i + 1], by_rows) for i in range(threads)]
    if threads == 1:
        jobs[0].run(count)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for finished in [pool.submit(job.run, count) for job in jobs]:
                finished.result()
    for job in jobs:
        job.add_to(total)


def _threads() -> int:
    """Threads that a large pair is worth: torch's, as far as there are cores for them."""
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 64)


class _Job:
    """One thread's part of a rectangle, with its own outputs."""

    def __init__(
        self, total: Sums, part: Rectangle, reference: Tensor, candidate: Tensor, low: int, high: int, by_rows: bool
    ) -> None:
        self.part, self.reference, self.candidate, self.scale = part, reference, candidate, total.scale
        self.row, self.num_rows = (low, high - low) if by_rows else (0, reference.shape[0])
        self.column, self.num_columns = (0, reference.shape[1]) if by_rows else (low, high - low)
        keep_channels = total.channels.size > 0
        self.rows = np.zeros((self.num_rows, 4))
        self.channels = np.zeros(self.num_columns if keep_channels else 0)
        self.sums, self.counts = np.zeros(3), np.zeros(7, np.int64)
        self.where = np.array([-1, 0, 0], np.int64)

    def run(self, count: bool) -> None:
        """Call the kernel; the GIL is released inside."""
        sides: list[int] = []
        for tensor in (self.reference, self.candidate):
            item, stride = tensor.element_size(), tensor.stride(0) * tensor.element_size()
            address = tensor.data_ptr() + self.row * stride + self.column * item
            sides += [address, CODES[tensor.dtype], item, stride, table_address(tensor.dtype)]
        kernels().pair(
            *sides, self.num_rows, self.num_columns, self.scale, count,
            self.rows, self.channels, self.sums, self.counts, self.where,
        )  # fmt: skip

    def add_to(self, total: Sums) -> None:
        """Add this part to the whole."""
        row, column = self.part.row + self.row, self.part.column + self.column
        total.add_rows(row, self.rows)
        if total.channels.size:
            total.channels[column : column + self.num_columns] += self.channels
        total.absolute += float(self.sums[0])
        total.reference += float(self.sums[1])
        total.error += float(self.sums[2])
        total.counts += self.counts
        if self.where[0] >= 0:
            value = float(self.where[:1].view(np.float64)[0])
            column += int(self.where[2])
            total.offer_max(value, row + int(self.where[1]), column, column + 1)


def _rescue_scale(left: Tensor, right: Tensor) -> float:
    """The power of two that brings the largest finite magnitude near 1, where its square fits float64."""
    top = 0.0
    for part in rectangles(left, right, _LIMIT["torch"]):
        for side in widen(part.reference, part.candidate)[:2]:
            magnitude = side.abs()
            top = max(top, float(torch.where(magnitude.isfinite(), magnitude, 0.0).max()))
    return 1.0 if top == 0.0 or 1e-100 < top < 1e100 else math.ldexp(1.0, -math.frexp(top)[1])


def _finish(
    left: Tensor,
    right: Tensor,
    total: Sums,
    place: tuple[tuple[int, ...], float, float, float],
    *,
    names: tuple[str, str],
    engine: str,
    count: bool,
) -> PairStats:
    """Turn sums into figures."""
    dd, rr, cc, rc = (float(x) for x in total.whole[0])
    whole = row_figures(total.whole)
    pairs = max(left.numel() - int(total.counts[5]), 1) * total.scale
    mean, error = total.reference / pairs, total.error / pairs
    modulus = abs if left.is_complex() or right.is_complex() else _real
    counts = [int(x) for x in total.counts]
    return PairStats(
        numel=left.numel(),
        rows=total.rows,
        mae=total.absolute / pairs,
        rmse=math.sqrt(dd / (pairs / total.scale)) / total.scale,
        max_abs_index=place[0],
        max_abs_reference=place[1],
        max_abs_candidate=place[2],
        max_abs=place[3],
        rel_l2=float(whole.rel_l2[0]),
        rel_diff=dd / (rr + cc) if rr + cc > 0 else 0.0,
        cosine=total.cosine_sum / total.rows if total.rows else 1.0,
        cosine_min=total.cosine_min,
        cosine_flat=float(whole.cosine[0]),
        slope=rc / rr if rr > 0 else (math.inf if cc > 0 else 1.0),
        mean_reference=modulus(mean),
        mean_candidate=modulus(mean + error),
        mean_error=modulus(error),
        nan_reference=counts[0],
        inf_reference=counts[1],
        nan_candidate=counts[2],
        inf_candidate=counts[3],
        nonfinite_mismatches=counts[4],
        unequal=counts[4] + counts[6] if count else None,
        exact=not is_floating(left.dtype) and not is_floating(right.dtype),
        row_error=total.kept.error / total.scale,
        row_norm=total.kept.norm / total.scale,
        row_rel_l2=total.kept.rel_l2,
        row_cosine=total.kept.cosine,
        channel_rms=np.sqrt(total.channels / max(total.rows, 1)) / total.scale,
        dtype_reference=names[0],
        dtype_candidate=names[1],
        engine=engine,
    )


def _real(value: complex) -> float:
    """The sum of real tensors, kept in a complex accumulator."""
    return value.real
