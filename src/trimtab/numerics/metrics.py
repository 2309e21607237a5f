"""One function per metric. Each is one figure of `compare_pair`, which gives all of them in the same single pass.

r is the reference, c the candidate; sums are float64 over the pairs that are finite on both sides; complex tensors
count by modulus. Errors: `InputError` when shapes differ.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from trimtab.errors import InputError
from trimtab.numerics.pair import compare_pair

MAE_BANDS = ("<0.01", "0.01-0.1", "0.1-1", ">1")


def mae(reference: Tensor, candidate: Tensor) -> float:
    """Mean absolute error `mean |c - r|`; 0 is equality; in the tensor's unit, so read it beside a norm."""
    return compare_pair(reference, candidate, per_row=False).mae


def rmse(reference: Tensor, candidate: Tensor) -> float:
    """Root mean square error `sqrt(mean |c - r|^2)`; 0 is equality; dominated by outlier channels."""
    return compare_pair(reference, candidate, per_row=False).rmse


def max_abs(reference: Tensor, candidate: Tensor) -> float:
    """Largest absolute error `max |c - r|`; 0 is equality."""
    return compare_pair(reference, candidate, per_row=False).max_abs


def rel_l2(reference: Tensor, candidate: Tensor) -> float:
    """Relative L2 error `|c - r| / |r|` of the whole tensor; 0 is equality, 1 is a candidate of zeros.

    Two zero tensors give 0, a zero reference alone inf.
    """
    return compare_pair(reference, candidate, per_row=False).rel_l2


def rel_diff(reference: Tensor, candidate: Tensor) -> float:
    """DeepGEMM's `1 - 2<r, c> / (|r|^2 + |c|^2)`, computed as `|c - r|^2 / (|r|^2 + |c|^2)`; range 0 to 2, 0 equal.

    The direct form is exact where the published one loses everything below 1e-16. It is quadratic: about
    `rel_l2^2 / 2`, so 1e-3 is a relative L2 error of 4.5 %.
    """
    return compare_pair(reference, candidate, per_row=False).rel_diff


def sqnr(reference: Tensor, candidate: Tensor) -> float:
    """Signal to quantisation noise ratio `-20 log10(rel_l2)` in dB; inf is equality (torchao's `compute_error`)."""
    error = rel_l2(reference, candidate)
    return math.inf if error == 0 else -20.0 * math.log10(error)


def cosine(reference: Tensor, candidate: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Cosine of every row over the last dimension, `<r, c> / (|r| |c|)`, [rows]; 1 is equal direction.

    Two zero rows give 1, one zero row 0. For complex rows the real part of the inner product counts.
    """
    return compare_pair(reference, candidate).row_cosine


def cosine_flat(reference: Tensor, candidate: Tensor) -> float:
    """Cosine of the whole tensors as two vectors; it hides bad rows, see `cosine`."""
    return compare_pair(reference, candidate, per_row=False).cosine_flat


def slope(reference: Tensor, candidate: Tensor) -> float:
    """Least squares factor `<r, c> / <r, r>` of `c ~ slope r`; 1 is no systematic scale, inf for a zero reference."""
    return compare_pair(reference, candidate, per_row=False).slope


def mae_band(value: float) -> str:
    """Name the band of a mean absolute error: "<0.01", "0.01-0.1", "0.1-1" (1 included) or ">1".

    Raises:
        InputError: for NaN or a negative number.
    """
    if not value >= 0:
        raise InputError(f"got an MAE of {value!r}; expected a number >= 0")
    if value > 1:
        return MAE_BANDS[3]
    return MAE_BANDS[0] if value < 0.01 else MAE_BANDS[1] if value < 0.1 else MAE_BANDS[2]
