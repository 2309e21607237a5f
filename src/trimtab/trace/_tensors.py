"""Tensors as bytes: snapshots, digests, and the dtypes of the format."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Sequence
from typing import Any

import torch
import xxhash

from trimtab.errors import InputError, TraceCorruptError

# Dtypes that every safetensors reader since 0.6 knows; all others are stored as bytes (U8).
SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@functools.cache
def dtype_text(dtype: torch.dtype) -> str:
    """Return a dtype as the index holds it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def dtype_of(text: str) -> torch.dtype:
    """Return the dtype that `dtype_text` named.

    Raises:
        TraceCorruptError: this torch has no such dtype.
    """
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise TraceCorruptError(f"the trace names dtype {text!r}, which torch {torch.__version__} does not have")
    return found


def snapshot(tensor: torch.Tensor, *, copy: bool = True) -> torch.Tensor:
    """Return the values as a contiguous CPU tensor that later writes to `tensor` do not reach.

    Args:
        tensor: any strided tensor on any device.
        copy: False returns the tensor itself where it already is contiguous on the CPU.

    Raises:
        InputError: not a tensor, or one without plain bytes: quantised, sparse, nested, distributed, meta.
    """
    if tensor.__class__ not in _PLAIN:
        _check_class(tensor)
    plain = tensor.detach()
    if plain.layout is not torch.strided or plain.is_quantized or plain.is_meta or plain.is_nested:
        raise InputError(_why_not(plain))
    plain = plain.resolve_conj().resolve_neg()
    if plain.device.type != "cpu":
        return plain.to("cpu").contiguous()
    if not copy and plain.is_contiguous():
        return plain
    try:
        return plain.clone(memory_format=torch.contiguous_format)
    except NotImplementedError:  # the sub-byte integers have no copy kernel; each element fills one byte
        raw = plain.view(torch.uint8).clone(memory_format=torch.contiguous_format)
        return raw.view(plain.dtype)


def buffer(tensor: torch.Tensor) -> Any:
    """Return the bytes of a contiguous CPU tensor without a copy; valid while the tensor lives."""
    size = tensor.nbytes
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


def digest(data: Any, dtype: str, shape: Sequence[int]) -> str:
    """Return the XXH3-128, in hexadecimal, of the line `bfloat16[2, 3]` (dtype, shape, line feed) and the bytes.

    Args:
        data: contiguous little-endian bytes.
        dtype: dtype as `dtype_text` writes it.
        shape: shape of the tensor.
    """
    state = xxhash.xxh3_128(f"{dtype}{list(shape)}\n".encode())
    state.update(data)
    return state.hexdigest()


def from_bytes(data: mmap.mmap | bytearray, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor over the bytes that begin at `start`, without a copy."""
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).reshape(tuple(shape))


def _check_class(tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"a torch.Tensor was expected, got {type(tensor).__name__}; wrap it: torch.as_tensor(value)")
    if hasattr(tensor, "to_local"):
        raise InputError(
            "a distributed tensor was given; write each rank's shard: tensor.to_local(), with dims naming the shards"
        )
    try:
        tensor.data_ptr()
    except RuntimeError as error:
        raise InputError(f"{type(tensor).__name__} has no bytes to store: {str(error).splitlines()[0]}") from error


def _why_not(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "a meta tensor has no values; materialise the model first"
    if tensor.is_quantized:
        return f"a quantised tensor ({tensor.dtype}) was given; write tensor.int_repr() and its scale, or dequantize()"
    return f"a tensor of layout {tensor.layout} was given; write tensor.to_dense() or its parts"
