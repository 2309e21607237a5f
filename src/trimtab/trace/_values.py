"""Stored values, found by shard and key: mapped into memory on a local disk, read by byte range elsewhere."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.errors import TraceCorruptError
from trimtab.trace._shard import ShardHeader
from trimtab.trace._store import Store
from trimtab.trace._tensors import digest, dtype_of, from_bytes

_OPEN_SHARDS = 64


class Values:
    """Reads tensors from the shards of a run; keeps the most recently used shards open."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: OrderedDict[str, tuple[ShardHeader, mmap.mmap | None]] = OrderedDict()

    def header(self, shard: str) -> ShardHeader:
        """Return the header of a shard.

        Raises:
            TraceCorruptError: the shard is missing, truncated or corrupt.
        """
        return self._shard(shard)[0]

    def tensor(self, shard: str, key: str, dtype: str, shape: Sequence[int]) -> torch.Tensor:
        """Return a stored tensor; on a local disk its memory is the file's, copied page by page when written to.

        Raises:
            TraceCorruptError: the shard is damaged, or does not fit the index.
        """
        header, mapped = self._shard(shard)
        entry = header.locate(key, dtype, shape)
        if mapped is not None:
            return from_bytes(mapped, entry.start, dtype_of(dtype), shape)
        return from_bytes(bytearray(self._store.read(shard, entry.start, entry.stop)), 0, dtype_of(dtype), shape)

    def rehash(self, shard: str, key: str, dtype: str, shape: Sequence[int]) -> str:
        """Return the digest of the bytes that are stored now.

        Raises:
            TraceCorruptError: the shard is damaged, or does not fit the index.
        """
        header, mapped = self._shard(shard)
        entry = header.locate(key, dtype, shape)
        data: Any
        if mapped is not None:
            data = memoryview(mapped)[entry.start : entry.stop]
        else:
            data = self._store.read(shard, entry.start, entry.stop)
        return digest(data, dtype, shape)

    def _shard(self, name: str) -> tuple[ShardHeader, mmap.mmap | None]:
        found = self._open.get(name)
        if found is None:
            try:
                header = ShardHeader(self._store, name)
                found = (header, self._store.map(name))
            except OSError as error:
                raise TraceCorruptError(f"{self._store.root}/{name} cannot be read: {error.strerror}") from error
            self._open[name] = found
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(name)
        return found
