"""How tensors lie in memory: storage codes for the kernels, and iteration in rectangles of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.numerics.dtypes import dtype_name

# The same numbers as in `_kernels`, which is not imported here because it loads numba.
_F64, _F32, _BF16, _F16, _TABLE, _I8, _U8, _I16, _U16, _I32, _U32, _I64, _U64, _C64, _C128 = range(15)

CODES: Final[dict[torch.dtype, int]] = {
    torch.float64: _F64,
    torch.float32: _F32,
    torch.bfloat16: _BF16,
    torch.float16: _F16,
    torch.int8: _I8,
    torch.uint8: _U8,
    torch.bool: _U8,
    torch.int16: _I16,
    torch.uint16: _U16,
    torch.int32: _I32,
    torch.uint32: _U32,
    torch.int64: _I64,
    torch.uint64: _U64,
    torch.complex64: _C64,
    torch.complex128: _C128,
}
_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
CODES.update({getattr(torch, name): _TABLE for name in _FLOAT8 if hasattr(torch, name)})

_FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
_FLOAT4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@cache
def kernels() -> Any:
    """Import the compiled passes (about half a second, once)."""
    from trimtab.numerics import _kernels

    return _kernels


@cache
def table(dtype: torch.dtype) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """The 256 values of an 8-bit float as float64; None for every other dtype."""
    if CODES.get(dtype) != _TABLE:
        return None
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    return codes.view(dtype).to(torch.float32).to(torch.float64).numpy()


@cache
def table_address(dtype: torch.dtype) -> int:
    """Address of `table(dtype)`, which lives as long as the process; 0 when there is none."""
    values = table(dtype)
    return 0 if values is None else int(values.ctypes.data)


def plain(tensor: Tensor) -> Tensor:
    """Detach, and bring rare storage into a form that the passes read; ordinary tensors are not copied.

    Packed 4-bit floats become float32 (twice as many columns), half complex becomes complex64, quantised tensors
    their values.

    Raises:
        InputError: for what is no dense tensor with values (sparse, meta, opaque dtypes).
    """
    if not isinstance(tensor, Tensor):
        raise InputError(f"got {type(tensor).__name__}; expected a torch.Tensor")
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise InputError(f"got a {tensor.layout} tensor on {tensor.device}; expected a dense one (call .to_dense())")
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.dtype == torch.complex32:
        return tensor.to(torch.complex64)
    if tensor.dtype == _FLOAT4 and tensor.dim() > 0:
        packed = tensor.contiguous().view(torch.uint8)
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
        return torch.tensor(_FLOAT4_VALUES, device=tensor.device)[nibbles.long()]
    if tensor.dtype not in CODES:
        known = ", ".join(sorted(dtype_name(dtype) for dtype in CODES))
        raise InputError(f"cannot read values of dtype {dtype_name(tensor.dtype)}; expected one of {known}")
    if tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    return tensor


class Rectangle(NamedTuple):
    """A part of two tensors seen as rows over the last dimension."""

    reference: Tensor
    candidate: Tensor
    row: int
    column: int


def rectangles(reference: Tensor, candidate: Tensor, limit: int) -> Iterator[Rectangle]:
    """Cut two tensors of one shape into 2-d views of at most `limit` elements, rows in order.

    A part is copied only where its layout allows no 2-d view, and never more than `limit` elements at once.
    """
    if reference.numel() == 0:
        return
    width = reference.shape[-1] if reference.dim() else 1
    for first, left, right in _row_views(reference, candidate, width, limit, 0):
        columns = min(width, limit)
        rows = max(1, limit // columns)
        for start in range(0, left.shape[0], rows):
            for column in range(0, width, columns):
                part = (slice(start, start + rows), slice(column, column + columns))
                yield Rectangle(left[part], right[part], first + start, column)


def _row_views(left: Tensor, right: Tensor, width: int, limit: int, first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first row, left as rows, right as rows), without copies where strides allow it."""
    if left.dim() <= 2 or left.numel() <= limit or (_viewable(left) and _viewable(right)):
        yield first, left.reshape(-1, width), right.reshape(-1, width)
        return
    inner = left.numel() // left.shape[0]
    step = max(1, limit // inner)
    for start in range(0, left.shape[0], step):
        here = first + start * (inner // width)
        if step == 1:
            yield from _row_views(left[start], right[start], width, limit, here)
        else:
            part = slice(start, start + step)
            yield here, left[part].reshape(-1, width), right[part].reshape(-1, width)


def _viewable(tensor: Tensor) -> bool:
    """Tell whether the leading dimensions merge into one without a copy."""
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    dims = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(dims))
