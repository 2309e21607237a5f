"""Names, precision and rounding of tensor dtypes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import InputError

_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "single": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int": "int32",
    "long": "int64",
    "short": "int16",
}

# Significand bits, the implicit one included.
_PRECISION = {
    "float64": 53,
    "float32": 24,
    "float16": 11,
    "bfloat16": 8,
    "float8_e4m3fn": 4,
    "float8_e4m3fnuz": 4,
    "float8_e5m2": 3,
    "float8_e5m2fnuz": 3,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 2,
    "complex32": 11,
    "complex64": 24,
    "complex128": 53,
}


_DROPPED = 11
"""Low bits of a 64-bit integer that float64 may not hold; what they were is kept in the bit above."""


def _all_dtypes() -> dict[str, torch.dtype]:
    """Every dtype this torch has, by its own name (`str(dtype)` without the `torch.` in front)."""
    found = (value for value in vars(torch).values() if isinstance(value, torch.dtype))
    return {str(dtype).removeprefix("torch."): dtype for dtype in found}


_BY_NAME = _all_dtypes()
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in _BY_NAME.values()}
_SIGNIFICAND = {_BY_NAME[name]: bits for name, bits in _PRECISION.items() if name in _BY_NAME}


def resolve_dtype(name_or_dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a name.

    Args:
        name_or_dtype: a torch dtype, its name (`"bfloat16"`, `"torch.bfloat16"`) or a usual short name (`"bf16"`,
            `"fp16"`, `"half"`, `"fp32"`, `"fp64"`, `"double"`, `"fp8_e4m3"`, ...). Case does not matter.

    Raises:
        InputError: when torch has no dtype of that name.
    """
    if isinstance(name_or_dtype, torch.dtype):
        return name_or_dtype
    if isinstance(name_or_dtype, str):
        name = name_or_dtype.strip().lower().removeprefix("torch.")
        found = _BY_NAME.get(_ALIASES.get(name, name))
        if found is not None:
            return found
    raise InputError(
        f"unknown dtype {name_or_dtype!r}; expected a torch dtype or a name such as "
        "float32, float16, bfloat16, float64, float8_e4m3fn, int64 (short: fp32, fp16, bf16, fp64, fp8_e4m3)"
    )


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return torch's own name of a dtype without the `torch.` in front: `"bfloat16"`."""
    return _NAMES[resolve_dtype(dtype)]


def is_floating(dtype: str | torch.dtype) -> bool:
    """Tell whether values of this dtype are rounded: real or complex floating point, float8 and float4 included."""
    return resolve_dtype(dtype) in _SIGNIFICAND


def unit_roundoff(dtype: str | torch.dtype) -> float:
    """Return the unit roundoff `u = 2^-p`, p the significand's bits with the implicit one.

    Rounding to nearest changes a normal value by at most `u` times its magnitude: bfloat16 2^-8, float16 2^-11,
    float32 2^-24, float64 2^-53, float8_e4m3fn 2^-4, float8_e5m2 2^-3. A complex dtype has its parts' roundoff.
    It is half of `torch.finfo(dtype).eps` (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 2.1).

    Raises:
        InputError: for a dtype whose values are not rounded (integers, booleans).
    """
    resolved = resolve_dtype(dtype)
    bits = _SIGNIFICAND.get(resolved)
    if bits is None:
        raise InputError(f"{dtype_name(resolved)} is exact and has no unit roundoff; expected a floating dtype")
    return float(2.0**-bits)


def coarser(a: str | torch.dtype, b: str | torch.dtype) -> torch.dtype:
    """Return the dtype with the larger unit roundoff; `a` on a tie.

    A floating dtype is coarser than an exact one. Of two exact dtypes the result is the smallest that holds the
    values of both, so nothing is lost.

    Raises:
        InputError: for uint64 and a signed integer, whose values no dtype holds.
    """
    first, second = resolve_dtype(a), resolve_dtype(b)
    bits_first, bits_second = _SIGNIFICAND.get(first), _SIGNIFICAND.get(second)
    if bits_first is None and bits_second is None:
        return first if first == second else _holding(first, second)
    if bits_first is None:
        return second
    if bits_second is None:
        return first
    return second if bits_second < bits_first else first


def _holding(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The smallest exact dtype that holds two (torch promotes no unsigned integers beyond uint8)."""
    names = dtype_name(first), dtype_name(second)
    found = np.promote_types(*names)
    if found.kind not in "biu":
        raise InputError(f"no exact dtype holds the values of both {names[0]} and {names[1]}; compare them as stored")
    return _BY_NAME[found.name]


def round_to(tensor: Tensor, dtype: str | torch.dtype) -> Tensor:
    """Round once, to nearest even, into another dtype.

    `Tensor.to` goes from float64 and from wide integers to the 16-bit and 8-bit formats through float32 and so rounds
    twice; here the step through float32 (and float64, for 64-bit integers) rounds to odd, after which the second
    rounding gives the correctly rounded result (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, IEEE
    TC 2008). Overflow follows torch's own conversion.
    """
    target = resolve_dtype(dtype)
    narrow = not target.is_complex and _SIGNIFICAND.get(target, 53) < 24
    if narrow and tensor.dtype in (torch.int32, torch.uint32):
        tensor = tensor.to(torch.float64)
    elif narrow and tensor.dtype in (torch.int64, torch.uint64):
        tensor = _integers_to_odd(tensor)
    if tensor.dtype != torch.float64 or not narrow:
        return tensor.to(target)
    single = tensor.to(torch.float32)
    bits = single.view(torch.int32)
    exact = single.to(torch.float64) == tensor
    beyond = single.abs().to(torch.float64) > tensor.abs()
    truncated = bits - beyond.to(torch.int32)
    keep = exact | tensor.isnan()
    return torch.where(keep, bits, truncated | 1).view(torch.float32).to(target)


def _integers_to_odd(tensor: Tensor) -> Tensor:
    """Round 64-bit integers to odd in float64; those that it holds stay as they are."""
    bits = tensor.view(torch.int64) if tensor.dtype == torch.uint64 else tensor
    high = bits >> _DROPPED
    if tensor.dtype == torch.uint64:
        high = high & ((1 << (64 - _DROPPED)) - 1)
        exact = high < 1 << (53 - _DROPPED)
    else:
        exact = (high >= -(1 << (53 - _DROPPED))) & (high < 1 << (53 - _DROPPED))
    sticky = ((bits & ((1 << _DROPPED) - 1)) != 0).to(torch.int64)
    odd = (high | sticky).to(torch.float64) * float(1 << _DROPPED)
    return torch.where(exact, torch.where(exact, bits, 0).to(torch.float64), odd)
