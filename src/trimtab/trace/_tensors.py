"""Tensors as bytes: snapshots, digests, and the dtypes of the format."""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
from collections.abc import Iterable, Sequence
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
_LARGE = 1 << 20  # above it, malloc maps fresh pages for every snapshot
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


class Buffers:
    """Memory of large snapshots, used again: fresh pages cost the model's thread more than the copy itself.

    Args:
        limit: most bytes that are kept for later.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: dict[int, list[torch.Tensor]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous CPU copy of a large tensor."""
        size = tensor.nbytes
        with self._lock:
            found = self._idle.get(size)
            flat = found.pop() if found else None
            if flat is not None:
                self._bytes -= size
        if flat is None:
            flat = torch.empty(size, dtype=torch.uint8)
        return flat.view(tensor.dtype).reshape(tensor.shape).copy_(tensor)

    def give(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take back snapshots that nobody reads any more."""
        with self._lock:
            for tensor in tensors:
                if tensor.nbytes >= _LARGE and self._bytes + tensor.nbytes <= self._limit:
                    self._bytes += tensor.nbytes
                    self._idle.setdefault(tensor.nbytes, []).append(tensor.reshape(-1).view(torch.uint8))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor without its graph, if it has plain bytes.

    Raises:
        InputError: not a tensor, or one without plain bytes: quantised, sparse, nested, distributed, meta.
    """
    if tensor.__class__ not in _PLAIN:
        _check_class(tensor)
    bare = tensor.detach()
    if bare.layout is not torch.strided or bare.is_quantized or bare.is_meta or bare.is_nested:
        raise InputError(_why_not(bare))
    return bare


def snapshot(tensor: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """Return the values of a plain tensor, contiguous and on the CPU, out of reach of later writes to it."""
    try:
        if tensor.nbytes >= _LARGE:
            return buffers.copy(tensor)
        if tensor.device.type == "cpu":
            return tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        return contiguous(tensor)
    except NotImplementedError:  # the sub-byte integers have no copy kernel; each element fills one byte
        return snapshot(tensor.view(torch.uint8), buffers).view(tensor.dtype)


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a plain tensor, contiguous and on the CPU; the tensor itself where it is so already."""
    return tensor.resolve_conj().resolve_neg().to("cpu").contiguous()


def buffer(tensor: torch.Tensor) -> Any:
    """Return the bytes of a contiguous CPU tensor without a copy; keeps the tensor alive."""
    size = tensor.nbytes
    if not size:
        return b""
    view = _array(size).from_address(tensor.data_ptr())
    view.owner = tensor  # type: ignore[attr-defined]
    return view


@functools.lru_cache(maxsize=512)
def _array(size: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * size  # making the type costs twenty times as much as using it


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
        return torch.empty(0, dtype=torch.uint8).view(dtype).reshape(tuple(shape))
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
