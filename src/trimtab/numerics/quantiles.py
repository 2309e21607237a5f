"""Quantiles: exact, and by a mergeable sketch with a stated error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from trimtab.errors import InputError
from trimtab.numerics._layout import plain, rectangles
from trimtab.numerics._sums import widen

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]

_CHUNK = 1 << 20
_MANTISSA = 7
_SHIFT = 52 - _MANTISSA

RELATIVE_ERROR = 2.0 ** -(_MANTISSA + 1)
"""A sketch's quantile differs from the exact one by at most this factor of its magnitude."""


def _ranks(probabilities: Sequence[float], count: int) -> Integers:
    """0-based rank of each quantile: `max(ceil(q n), 1) - 1`."""
    q = np.asarray(probabilities, dtype=np.float64)
    if q.size and not (np.all(q >= 0) and np.all(q <= 1)):
        raise InputError(f"got probabilities {list(probabilities)}; expected numbers in [0, 1]")
    ranks = np.maximum(np.ceil(q * count), 1).astype(np.int64) - 1
    return np.asarray(np.minimum(ranks, max(count - 1, 0)), dtype=np.int64)


def quantiles(tensor: Tensor, probabilities: Sequence[float]) -> Floats:
    """Return exact quantiles: the smallest element x with at least a share q of the elements <= x.

    `x_(max(ceil(q n), 1))` of the sorted elements (the inverse of the empirical distribution function; Hyndman and
    Fan, Sample quantiles, 1996, definition 1), so a quantile is always an element. NaN are left out, infinities are
    ordered, complex tensors count by modulus. Memory: one float64 copy.

    Args:
        tensor: dense real or complex tensor of any shape and dtype.
        probabilities: numbers q in [0, 1].

    Returns:
        float64 array, one per probability; NaN when there is no element.
    """
    values = np.concatenate([np.zeros(0), *_chunks(tensor)])
    ranks = _ranks(probabilities, values.size)
    if values.size == 0:
        return np.full(ranks.shape, math.nan)
    return np.asarray(np.partition(values, np.unique(ranks))[ranks]) if ranks.size else np.zeros(0)


def _chunks(tensor: Tensor) -> list[Floats]:
    """The non-NaN values (moduli of complex ones) as float64 arrays of bounded size."""
    source = plain(tensor)
    chunks = []
    for part in rectangles(source, source, _CHUNK):
        cpu = part.reference.cpu()
        wide = widen(cpu, cpu)[0]
        values = (wide.abs() if wide.is_complex() else wide).reshape(-1).numpy()
        chunks.append(values[~np.isnan(values)])
    return chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantileSketch:
    """A histogram over floating point numbers whose buckets are exponents with 7 bits of the significand.

    A bucket is 2^-7 of its values wide and stands for its middle, so a quantile has a relative error of at most
    2^-8 = 0.4 %, for every distribution and after any number of merges; zero, infinities and the least and greatest
    value are exact (float64's subnormal numbers are within 2^-1029 instead). The idea is that of HdrHistogram and of
    DDSketch (Masson et al., VLDB 2019), with float64's own bits as the logarithm. Merging adds counts: exact,
    commutative and associative.
    """

    keys: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    """Ordered bucket numbers."""
    counts: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    least: float = math.inf
    greatest: float = -math.inf

    @classmethod
    def of(cls, tensor: Tensor) -> QuantileSketch:
        """Count the elements of a tensor; NaN are left out, complex ones count by modulus. Memory is bounded."""
        result = cls()
        source = plain(tensor)
        for part in rectangles(source, source, _CHUNK):
            for values in _chunks(part.reference):
                if values.size:
                    bits = (values + 0.0).view(np.int64)  # + 0.0 turns -0 into 0
                    magnitude = (bits & np.int64(0x7FFFFFFFFFFFFFFF)) >> _SHIFT
                    keys, counts = np.unique(np.where(bits < 0, -magnitude - 1, magnitude), return_counts=True)
                    low, high = float(values.min()), float(values.max())
                    result = result.merge(cls(keys=keys, counts=counts.astype(np.int64), least=low, greatest=high))
        return result

    @property
    def count(self) -> int:
        """Elements seen, NaN left out."""
        return int(self.counts.sum())

    def merge(self, other: QuantileSketch) -> QuantileSketch:
        """Return the sketch of both sets of values together."""
        keys, place = np.unique(np.concatenate((self.keys, other.keys)), return_inverse=True)
        counts = np.zeros(keys.shape, np.int64)
        np.add.at(counts, place, np.concatenate((self.counts, other.counts)))
        return QuantileSketch(
            keys=keys,
            counts=counts,
            least=min(self.least, other.least),
            greatest=max(self.greatest, other.greatest),
        )

    def quantiles(self, probabilities: Sequence[float]) -> Floats:
        """Return the quantiles as `quantiles()` defines them, within `RELATIVE_ERROR`; NaN when nothing was seen."""
        ranks = _ranks(probabilities, self.count)
        if self.count == 0:
            return np.full(ranks.shape, math.nan)
        bucket = np.searchsorted(np.cumsum(self.counts), ranks, side="right")
        return np.clip(_middle(self.keys[bucket]), self.least, self.greatest)


def _middle(keys: Integers) -> Floats:
    """The middle of each bucket; zero and infinity stand for themselves."""
    magnitude = np.where(keys < 0, -keys - 1, keys)
    low = (magnitude << _SHIFT).view(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        high = ((magnitude + 1) << _SHIFT).view(np.float64)
        middle = np.where(np.isinf(low), low, low + np.where(np.isinf(high), 0.0, (high - low) / 2))
    middle = np.where(magnitude == 0, 0.0, middle)
    return np.where(keys < 0, -middle, middle)
