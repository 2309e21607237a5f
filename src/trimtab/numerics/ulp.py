"""Distance in representable steps (units in the last place)."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.numerics._layout import CODES, kernels
from trimtab.numerics.dtypes import dtype_name, resolve_dtype, round_to

INCOMPARABLE = torch.iinfo(torch.int64).max
"""The distance to a NaN from anything that is none; also where a float64 distance would not fit int64."""

_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Bits of infinity in the dtypes that the compiled pass reads."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _supported(dtype: torch.dtype) -> bool:
    """Tell whether this is a real floating format of one value per element."""
    return dtype.is_floating_point and "_x2" not in dtype_name(dtype)


def ordered_integers(tensor: Tensor) -> Tensor:
    """Map floats to integers in their order: neighbours differ by 1, both zeros are 0, negatives are negative.

    The bits of an IEEE-like format are a sign and a magnitude whose integer order is the order of the values, so
    `i = magnitude` or `-magnitude` (Dawson, Comparing Floating Point Numbers, 2012). NaN maps beyond infinity.

    Args:
        tensor: real floating tensor of any shape (float64, float32, float16, bfloat16, float8).

    Returns:
        int64 tensor of the same shape.
    """
    width = tensor.element_size()
    bits = tensor.contiguous().view(_BITS[width]).to(torch.int64)
    if tensor.dtype == getattr(torch, "float8_e8m0fnu", None):  # an exponent only: no sign, no zero
        return bits & 0xFF
    magnitude = bits & ((1 << (8 * width - 1)) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)


def ulp_distance(a: Tensor, b: Tensor, dtype: str | torch.dtype) -> Tensor:
    """Count the representable steps of `dtype` between two tensors: `|i(a) - i(b)|`, i the ordered integers.

    Both sides are first rounded to `dtype` (once, to nearest even). The count is aware of signs: from -tiny to +tiny
    are 2 steps, and -0 equals +0. Infinity is one step beyond the largest finite value. Two NaN are 0 apart; a NaN
    and anything else are `INCOMPARABLE` (the largest int64), as is a float64 distance that int64 cannot hold.

    Args:
        a: real tensor of any shape and dtype.
        b: tensor of the same shape.
        dtype: the format whose steps are counted: float64, float32, float16, bfloat16, or a float8.

    Returns:
        int64 tensor of the same shape; 0 means equal in that dtype.

    Raises:
        InputError: when shapes differ, an input is complex, or `dtype` is no real floating format.
    """
    target = resolve_dtype(dtype)
    if not _supported(target):
        raise InputError(f"no ULP in {dtype_name(target)}; expected a real floating dtype such as bfloat16")
    if a.shape != b.shape:
        raise InputError(f"got shapes {tuple(a.shape)} and {tuple(b.shape)}; expected equal shapes")
    if a.is_complex() or b.is_complex():
        raise InputError("got a complex tensor; take the ULP distance of .real and .imag instead")
    left, right = round_to(a.detach(), target), round_to(b.detach(), target)
    steps = (ordered_integers(left) - ordered_integers(right)).abs()
    steps = torch.where(steps < 0, INCOMPARABLE, steps)  # abs of the wrapped minimum
    if target == torch.float64:  # opposite signs may exceed int64: the difference wraps
        steps = torch.where(_wraps(left, right), INCOMPARABLE, steps)
    nan_left, nan_right = _is_nan(left), _is_nan(right)
    steps = torch.where(nan_left ^ nan_right, INCOMPARABLE, steps)
    return torch.where(nan_left & nan_right, 0, steps)


def max_ulp(a: Tensor, b: Tensor, dtype: str | torch.dtype) -> int:
    """Return the largest `ulp_distance` of two tensors; 0 when they hold no element.

    In float32, bfloat16 and float16 on the CPU this is one compiled pass; elsewhere it is made of tensors.
    """
    target = resolve_dtype(dtype)
    found = _farthest(a, b, target)
    if found is not None and found[1] <= _INFINITY[target]:
        return found[0]
    distance = ulp_distance(a, b, target)
    return int(distance.max()) if distance.numel() else 0


def max_ulp_finite(a: Tensor, b: Tensor, dtype: str | torch.dtype) -> int | None:
    """Return `max_ulp`, or None when an element of either side is NaN or infinite."""
    target = resolve_dtype(dtype)
    found = _farthest(a, b, target)
    if found is not None and found[1] < _INFINITY[target]:
        return found[0]
    widened = (side.to(torch.float64) for side in (a, b))  # what overflows in `dtype` alone is finite
    return max_ulp(a, b, target) if all(bool(side.isfinite().all()) for side in widened) else None


def _farthest(a: Tensor, b: Tensor, target: torch.dtype) -> tuple[int, int] | None:
    """Largest distance in steps of `target` and bits of the largest magnitude; None where no kernel reads the sides."""
    if target not in _INFINITY or a.shape != b.shape or not (a.is_cpu and b.is_cpu) or a.is_complex() or b.is_complex():
        return None
    left, right = (round_to(side.detach(), target).resolve_neg().contiguous() for side in (a, b))
    distance, top = kernels().farthest(left.data_ptr(), right.data_ptr(), CODES[target], left.numel())
    return int(distance), int(top)


def _wraps(left: Tensor, right: Tensor) -> Tensor:
    """Where the difference of two float64 ordered integers of opposite sign does not fit int64."""
    i, j = ordered_integers(left), ordered_integers(right)
    return ((i >= 0) != (j >= 0)) & (i.abs() > INCOMPARABLE - j.abs())


def _is_nan(tensor: Tensor) -> Tensor:
    """`isnan` for every float dtype (float8 goes through float32, exactly)."""
    return tensor.to(torch.float32).isnan() if tensor.element_size() == 1 else tensor.isnan()
