"""Shards: safetensors files written straight from the snapshots, whose metadata repeats the identity of every record.

A shard is an 8-byte little-endian header length, the JSON header, the tensors. Tensors are ordered by falling item
size and the data begins at a multiple of 64 bytes, so that every tensor can be used in place when the file is mapped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from trimtab.errors import TraceCorruptError
from trimtab.trace._format import FORMAT_VERSION, IDENTITY, MEASURED
from trimtab.trace._store import Store
from trimtab.trace._tensors import SAFETENSORS_DTYPES, buffer, dtype_of, dtype_text

_ALIGNMENT = 64
_FLOATS = frozenset(name for name, kind in MEASURED.items() if str(kind) == "Float64")
HEADER_LIMIT = 90_000_000  # the safetensors library refuses headers above 100 MB


class Entry(NamedTuple):
    """Where one tensor lies in its shard."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def encode_shard(
    keys: Sequence[str | None], tensors: Sequence[torch.Tensor], columns: Mapping[str, Sequence[Any]]
) -> list[Any]:
    """Return the chunks of a shard; the tensors are not copied and must stay alive.

    Args:
        keys: key per record; None for a record whose values are not stored.
        tensors: contiguous CPU tensors of the records that have a key.
        columns: identity and measured columns of the records, in the same order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "trimtab": _encode_identity(keys, columns)}}
    stored = [key for key in keys if key is not None]
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index].itemsize)
    chunks: list[Any] = [b""]
    position = 0
    for index in order:
        tensor = tensors[index]
        size = tensor.nbytes
        kind = SAFETENSORS_DTYPES.get(dtype_text(tensor.dtype))
        shape = list(tensor.shape) if kind else [size]
        header[stored[index]] = {
            "dtype": kind or "U8",
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
        if size:
            chunks.append(buffer(tensor))
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    chunks[0] = len(text).to_bytes(8, "little") + text
    return chunks


class ShardHeader:
    """The header of a shard: its entries, its identity columns and its size.

    Raises:
        TraceCorruptError: the file is shorter than its header says, or the header cannot be read.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        size = store.size(name)
        if size is None:
            raise TraceCorruptError(f"{store.root}/{name} is missing; restore it from a copy")
        length = int.from_bytes(store.read(name, 0, 8), "little") if size >= 8 else 0
        if not 2 <= length <= size - 8:
            raise TraceCorruptError(_damaged(store, name, f"{size} bytes cannot hold its header of {length} bytes"))
        try:
            header = json.loads(store.read(name, 8, 8 + length))
            self._identity: str | None = header.pop("__metadata__", {}).get("trimtab")
            data = 8 + length
            self.entries = {
                key: Entry(item["dtype"], tuple(item["shape"]), data + begin, data + end)
                for key, item in header.items()
                for begin, end in [item["data_offsets"]]
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TraceCorruptError(_damaged(store, name, f"its header cannot be read ({error})")) from error
        self.size = max((entry.stop for entry in self.entries.values()), default=8 + length)
        if size != self.size:
            raise TraceCorruptError(_damaged(store, name, f"it has {size} bytes, its header says {self.size}"))

    def locate(self, key: str, dtype: str, shape: Sequence[int]) -> Entry:
        """Return the entry of a record, checked against what the index says of it.

        Raises:
            TraceCorruptError: there is none, or its size does not fit dtype and shape.
        """
        entry = self.entries.get(key)
        if entry is None:
            raise TraceCorruptError(f"{self.name} has no tensor {key!r}, which the index names; run trace repair")
        expected = math.prod(shape) * dtype_of(dtype).itemsize
        if entry.stop - entry.start != expected:
            raise TraceCorruptError(
                f"{self.name}: tensor {key!r} has {entry.stop - entry.start} bytes, the index says {dtype} "
                f"{list(shape)}: {expected} bytes"
            )
        return entry

    def identity(self) -> tuple[list[str | None], dict[str, list[Any]]]:
        """Return keys and columns of the records of this shard, as they were written.

        Raises:
            TraceCorruptError: the metadata is not ours.
        """
        if self._identity is None:
            raise TraceCorruptError(f"{self.name} is no shard of a trace: its metadata has no identity columns")
        try:
            return _decode_identity(self._identity)
        except (ValueError, KeyError, TypeError) as error:
            raise TraceCorruptError(f"{self.name}: its identity columns cannot be read ({error})") from error


def data_bytes(store: Store, name: str) -> int:
    """Return the bytes of tensors in a shard."""
    size = store.size(name) or 0
    return max(0, size - 8 - int.from_bytes(store.read(name, 0, 8), "little")) if size >= 8 else 0


def _encode_identity(keys: Sequence[str | None], columns: Mapping[str, Sequence[Any]]) -> str:
    packed: dict[str, Any] = {}
    for name in (*IDENTITY, *MEASURED):
        values: Sequence[Any] = columns[name]
        if name in _FLOATS:
            values = [_plain_float(value) for value in values]
        first = values[0]
        if values.count(first) == len(values):
            packed[name] = {"all": first}
        else:
            packed[name] = {"each": list(values)}
    return json.dumps(
        {"format_version": FORMAT_VERSION, "keys": list(keys), "columns": packed},
        separators=(",", ":"),
        allow_nan=False,
        ensure_ascii=False,
    )


def _decode_identity(text: str) -> tuple[list[str | None], dict[str, list[Any]]]:
    packed = json.loads(text)
    keys: list[str | None] = packed["keys"]
    columns = {}
    for name in (*IDENTITY, *MEASURED):
        column = packed["columns"][name]
        values = list(_repeat(column, len(keys)))
        if name in _FLOATS:
            values = [float(value) if isinstance(value, str) else value for value in values]
        columns[name] = values
    return keys, columns


def _repeat(column: Mapping[str, Any], count: int) -> Iterator[Any]:
    if "all" in column:
        return iter([column["all"]] * count)
    if len(column["each"]) != count:
        raise ValueError(f"{len(column['each'])} values for {count} records")
    return iter(column["each"])


def _plain_float(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _damaged(store: Store, name: str, what: str) -> str:
    return f"{store.root}/{name} is truncated or corrupt: {what}; restore it from a copy; other shards stay readable"
