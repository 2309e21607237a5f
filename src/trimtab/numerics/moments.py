"""Mean, standard deviation and magnitude in one pass, mergeable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.numerics._layout import CODES, kernels, plain, rectangles, table_address

_CHUNK = 1 << 20


class TensorStatistics(NamedTuple):
    """What a trace records of every tensor. Figures are over the finite values, NaN where there is none."""

    mean: float
    """Arithmetic mean; of a complex tensor: of the moduli."""
    std: float
    """Population standard deviation, `sqrt(sum (x - mean)^2 / n)`."""
    absmax: float
    """Largest magnitude."""
    nan_count: int
    inf_count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """One-pass statistics in float64 that merge in any grouping.

    A block is reduced around its own mean and blocks are joined by the update of Chan, Golub and LeVeque (Updating
    formulae and a pairwise algorithm for computing sample variances, 1979), so data on a large offset lose nothing:
    `delta = mean_b - mean_a; mean = mean_a + delta n_b / n; m2 = m2_a + m2_b + delta^2 n_a n_b / n`.
    Squares must fit float64, so spreads beyond 1e154 (float64 tensors only) give an infinite `std`.
    """

    count: int = 0
    """Finite values seen."""
    mean: float = math.nan
    """Mean of the finite values; NaN when there is none. Complex tensors count by modulus."""
    m2: float = 0.0
    """Sum of squared deviations from the mean."""
    absmax: float = math.nan
    """Largest finite magnitude; NaN when there is none."""
    nan_count: int = 0
    inf_count: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Moments:
        """Reduce a dense tensor of any shape, dtype, layout and device, in constant memory."""
        values = plain(tensor)
        if values.is_contiguous() and values.is_cpu:
            return cls._of_contiguous(values)
        result = cls()
        for part in rectangles(values, values, _CHUNK):
            result = result.merge(cls._of_contiguous(part.reference.to("cpu").contiguous()))
        return result

    @classmethod
    def _of_contiguous(cls, values: Tensor) -> Moments:
        """Reduce what the kernel can read where it lies."""
        count, mean, m2, absmax, nans, infs = kernels().moments(
            values.data_ptr(), CODES[values.dtype], values.element_size(), values.numel(), table_address(values.dtype)
        )
        if count == 0:
            return cls(nan_count=nans, inf_count=infs)
        return cls(count=count, mean=mean, m2=m2, absmax=absmax, nan_count=nans, inf_count=infs)

    def merge(self, other: Moments) -> Moments:
        """Return the statistics of both sets of values together."""
        nans, infs = self.nan_count + other.nan_count, self.inf_count + other.inf_count
        if self.count == 0 or other.count == 0:
            full = other if self.count == 0 else self
            return Moments(
                count=full.count, mean=full.mean, m2=full.m2, absmax=full.absmax, nan_count=nans, inf_count=infs
            )
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + delta * delta * (self.count * (other.count / count)),
            absmax=max(self.absmax, other.absmax),
            nan_count=nans,
            inf_count=infs,
        )

    @property
    def variance(self) -> float:
        """Population variance `m2 / count`; NaN when nothing is finite."""
        return self.m2 / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation, the root of `variance`."""
        return math.sqrt(self.variance)

    @property
    def rms(self) -> float:
        """Root mean square, `sqrt(variance + mean^2)`."""
        return math.sqrt(self.variance + self.mean * self.mean)


def tensor_statistics(tensor: Tensor) -> TensorStatistics:
    """Return mean, std, absmax and the counts of NaN and Inf of a tensor, fast.

    The numbers are those of `Moments.of`: float64, over finite values, complex by modulus, integers and booleans by
    value. An 8 KB tensor takes a few microseconds; the GIL is released while the values are read.

    Args:
        tensor: dense tensor of any shape and dtype; read where it lies when contiguous on the CPU.
    """
    code = CODES.get(tensor.dtype)
    plainly = tensor.layout == torch.strided and tensor.is_cpu and tensor.is_contiguous()
    if code is None or not plainly or tensor.is_conj() or tensor.is_neg():
        whole = Moments.of(tensor)
        return TensorStatistics(whole.mean, whole.std, whole.absmax, whole.nan_count, whole.inf_count)
    count, mean, m2, absmax, nans, infs = kernels().moments(
        tensor.data_ptr(), code, tensor.element_size(), tensor.numel(), table_address(tensor.dtype)
    )
    if count == 0:
        return TensorStatistics(math.nan, math.nan, math.nan, nans, infs)
    return TensorStatistics(mean, math.sqrt(m2 / count), absmax, nans, infs)
