"""What one pass over a pair accumulates, and the torch form of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.numerics._layout import Rectangle, rectangles
from trimtab.numerics.dtypes import is_floating, round_to

Array = np.ndarray[Any, np.dtype[np.float64]]

_WIDE = (torch.int64, torch.uint64)
_LOW = 0xFFFFFFFF
_TINY = 1e-280
"""Sums of squares below this may have lost terms to underflow."""


class RowFigures(NamedTuple):
    """Figures of rows (or of one long row: the whole)."""

    error: Array
    norm: Array
    rel_l2: Array
    cosine: Array


def row_figures(sums: Array) -> RowFigures:
    """Figures of `sums` [n, 4] = dd, rr, cc, rc; two zero rows give 0 and cosine 1, one zero row inf or cosine 0."""
    error, norm, other = np.sqrt(sums[:, 0]), np.sqrt(sums[:, 1]), np.sqrt(sums[:, 2])
    with np.errstate(divide="ignore", invalid="ignore"):
        rel_l2 = np.where(norm > 0, error / norm, np.where(error > 0, np.inf, 0.0))
        product = sums[:, 3] / norm / other
    cosine = np.where((norm > 0) & (other > 0), np.clip(product, -1.0, 1.0), np.where(norm == other, 1.0, 0.0))
    return RowFigures(error, norm, rel_l2, cosine)


class Sums:
    """Running sums of a comparison. Rows arrive in order; a row may arrive in several column parts."""

    def __init__(self, *, rows: int, channels: int, keep_rows: bool, scale: float, watch: bool = False) -> None:
        self.rows, self.scale = rows, scale
        self.channels = np.zeros(channels)
        self.absolute, self.reference, self.error = 0.0, 0j, 0j
        self.counts = np.zeros(7, np.int64)
        """Reference NaN, Inf, candidate NaN, Inf, mismatched, left out of the sums, unequal among finite pairs."""
        self.whole = np.zeros((1, 4))
        self.cosine_sum, self.cosine_min = 0.0, 1.0
        self.kept = RowFigures(*(np.zeros(rows if keep_rows else 0) for _ in RowFigures._fields))
        self.best = (-1.0, 0, 0, 0)
        """Largest |c - r|, its row, and the column range that holds it."""
        self.suspects: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        """Rows whose squares left the range of float64, in parts; noted when watched for, and not in the cosines."""
        self._watch = watch
        self._pending, self._first = np.zeros((0, 4)), 0

    def begin(self, part: Rectangle) -> None:
        """Make room for a rectangle's rows."""
        if part.column == 0:
            self._first, self._pending = part.row, np.zeros((part.reference.shape[0], 4))

    def add_rows(self, row: int, sums: Array) -> None:
        """Add dd, rr, cc, rc of rows that start at `row`."""
        start = row - self._first
        self._pending[start : start + len(sums)] += sums

    def end(self) -> None:
        """Close the rows of the last rectangle: all their columns are in."""
        figures = row_figures(self._pending)
        self.whole += self._pending.sum(axis=0)
        cosine = figures.cosine
        if self._watch:
            squares = self._pending[:, :3]
            bad = (squares < _TINY).any(axis=1) | ~np.isfinite(squares).all(axis=1)
            self.suspects.append(self._first + np.flatnonzero(bad))
            cosine = cosine[~bad]
        self.cosine_sum += float(cosine.sum())
        self.cosine_min = float(cosine.min(initial=self.cosine_min))
        if self.kept.error.size:
            place = slice(self._first, self._first + len(self._pending))
            for kept, new in zip(self.kept, figures, strict=True):
                kept[place] = new

    def offer_max(self, value: float, row: int, low: int, high: int) -> None:
        """Remember the largest difference, the first in row-major order among equals."""
        if value > self.best[0] or (value == self.best[0] and (row, low) < self.best[1:3]):
            self.best = (value, row, low, high)

    def left_range(self) -> bool:
        """Tell whether squares of float64 values may have overflowed or underflowed."""
        norms = self.whole[0, 1:3]
        return not bool(np.all(np.isfinite(self.whole)) and norms.min() > 1e-280 and norms.max() < 1e280)


def scaled_figures(left: Tensor, right: Tensor, rows: np.ndarray[Any, np.dtype[np.int64]]) -> RowFigures:
    """Figures of some rows of two tensors, every row of either side and every difference at its own power of two."""
    width = left.shape[-1] if left.dim() else 1
    parts = []
    for part in rectangles(left, right, max(width, 1 << 20)):
        low, high = np.searchsorted(rows, (part.row, part.row + part.reference.shape[0]))
        if low == high:
            continue
        picked = torch.from_numpy(rows[low:high] - part.row)
        sides = widen(part.reference.cpu()[picked], part.candidate.cpu()[picked])[:2]
        r, c = (torch.view_as_real(x).flatten(1).numpy() if x.is_complex() else x.numpy() for x in sides)
        good = np.isfinite(r) & np.isfinite(c)
        r, c = np.where(good, r, 0.0), np.where(good, c, 0.0)
        (norm, unit_r), (other, unit_c) = _own_scale(r), _own_scale(c)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            error = _own_scale(c - r)[0]
            error = np.where(np.isfinite(error), error, 2.0 * _own_scale(c / 2 - r / 2)[0])
            rel_l2 = np.where(norm > 0, error / norm, np.where(error > 0, np.inf, 0.0))
        cosine = np.clip(np.einsum("rc,rc->r", unit_r, unit_c), -1.0, 1.0)
        cosine = np.where((norm > 0) & (other > 0), cosine, np.where(norm == other, 1.0, 0.0))
        parts.append(RowFigures(error, norm, rel_l2, cosine))
    return RowFigures(*(np.concatenate(figure) for figure in zip(*parts, strict=True)))


def _own_scale(rows: Array) -> tuple[Array, Array]:
    """Norms of rows, and the rows at norm 1 (rows of zeros stay); nothing overflows or underflows on the way."""
    exponent = np.frexp(np.abs(rows).max(axis=1))[1]
    near_one = np.ldexp(rows, -exponent[:, None])
    norm = np.sqrt(np.einsum("rc,rc->r", near_one, near_one))
    return np.ldexp(norm, exponent), near_one / np.where(norm > 0, norm, 1.0)[:, None]


def wide_integers(left: torch.dtype, right: torch.dtype) -> bool:
    """Tell whether both sides are exact and one has 64 bits, which float64 cannot hold."""
    return not is_floating(left) and not is_floating(right) and (left in _WIDE or right in _WIDE)


def widen(reference: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return r, c, c - r in float64 (complex128 for complex) and where they are unequal.

    The difference of 64-bit integers is formed from their 32-bit halves, so it is exact up to its one rounding.
    """
    if wide_integers(reference.dtype, candidate.dtype):
        (high_r, low_r), (high_c, low_c) = _halves(reference), _halves(candidate)
        difference = (high_c - high_r).double() * 2.0**32 + (low_c - low_r).double()
        r, c = (high.double() * 2.0**32 + low.double() for high, low in ((high_r, low_r), (high_c, low_c)))
        return r, c, difference, (high_r != high_c) | (low_r != low_c)
    r, c = _double(reference), _double(candidate)
    if r.is_complex() != c.is_complex():
        r, c = r.to(torch.complex128), c.to(torch.complex128)
    return r, c, c - r, r != c


def _halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of integers, so that the value is `high 2^32 + low`."""
    if tensor.dtype == torch.uint64:
        bits = tensor.view(torch.int64)
        return (bits >> 32) & _LOW, bits & _LOW
    wide = tensor.to(torch.int64)
    return wide >> 32, wide & _LOW


def _double(tensor: Tensor) -> Tensor:
    """Exact widening of every dtype but 64-bit integers (float8 has no direct conversion everywhere)."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)
    return tensor.to(torch.float64)


def add_torch(total: Sums, part: Rectangle) -> None:
    """Reduce one rectangle with torch, on its device where that has float64."""
    if part.reference.is_cuda:
        reference, candidate = part.reference, part.candidate.to(part.reference.device)
    else:
        reference, candidate = part.reference.cpu(), part.candidate.cpu()
    r, c, d, unequal = widen(reference, candidate)
    if total.scale != 1.0:
        r, c = r * total.scale, c * total.scale
        d = c - r
    finite = r.isfinite() & c.isfinite()
    if not bool(finite.all()):
        _count_nonfinite(total, r, c, finite)
        zero = torch.zeros((), dtype=r.dtype, device=r.device)
        r, c, d = (torch.where(finite, x, zero) for x in (r, c, d))
        unequal = unequal & finite
    magnitude = d.abs()
    dd, rr, cc = (_square(x) for x in (d, r, c))
    rc = (r.real * c.real + r.imag * c.imag) if r.is_complex() else r * c
    total.add_rows(part.row, torch.stack([x.sum(dim=1) for x in (dd, rr, cc, rc)], dim=1).cpu().numpy())
    if total.channels.size:
        total.channels[part.column : part.column + r.shape[1]] += dd.sum(dim=0).cpu().numpy()
    total.absolute += float(magnitude.sum())
    total.reference += complex(r.sum().item())
    total.error += complex(d.sum().item())
    total.counts[6] += int(unequal.sum())
    flat = int(magnitude.argmax())
    row, column = divmod(flat, r.shape[1])
    total.offer_max(float(magnitude[row, column]), part.row + row, part.column + column, part.column + column + 1)


def _square(x: Tensor) -> Tensor:
    """Squared modulus."""
    return x.real * x.real + x.imag * x.imag if x.is_complex() else x * x


def _count_nonfinite(total: Sums, r: Tensor, c: Tensor, finite: Tensor) -> None:
    """Count NaN and Inf on both sides, and the positions where their kinds differ."""
    parts_r, parts_c = (torch.view_as_real(x) if x.is_complex() else x[..., None] for x in (r, c))
    same = ((parts_r == parts_c) | (parts_r.isnan() & parts_c.isnan())).all(dim=-1)
    kinds = (r.isnan(), r.isinf() & ~r.isnan(), c.isnan(), c.isinf() & ~c.isnan(), ~finite & ~same, ~finite)
    for i, kind in enumerate(kinds):
        total.counts[i] += int(kind.sum())


def largest(
    total: Sums, left: Tensor, right: Tensor, common: torch.dtype | None
) -> tuple[tuple[int, ...], float, float, float]:
    """Return index, reference, candidate and size of the largest difference, found again inside its block."""
    if left.numel() == 0:
        return (), 0.0, 0.0, 0.0
    _, row, low, high = total.best if total.best[0] > 0 else (0.0, 0, 0, 1)
    leading = tuple(int(i) for i in np.unravel_index(row, left.shape[:-1])) if left.dim() > 1 else ()
    reference, candidate = left[leading], right[leading].to(left.device)
    if left.dim():
        reference, candidate = reference[low:high], candidate[low:high]
    reference, candidate = reference.reshape(-1), candidate.reshape(-1)
    if left.device.type not in ("cpu", "cuda"):
        reference, candidate = reference.cpu(), candidate.cpu()
    if common is not None:
        reference, candidate = round_to(reference, common), round_to(candidate, common)
    r, c, d, _ = widen(reference, candidate)
    size = torch.where(r.isfinite() & c.isfinite(), d.abs(), -1.0)
    column = int(size.argmax())
    index = (*leading, low + column) if left.dim() else ()
    value = max(total.best[0] / total.scale, 0.0)
    return index, _value(reference[column]), _value(candidate[column]), value


def _value(element: Tensor) -> float:
    """A stored value as a Python number; integers stay integers, complex ones give their modulus."""
    if not is_floating(element.dtype):
        return int(element.item())
    wide = _double(element)
    return float(wide.abs().item() if wide.is_complex() else wide.item())
