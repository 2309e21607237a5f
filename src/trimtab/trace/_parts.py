"""The open part of a sub-trace: what the writer's thread has measured and not yet committed."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl
import torch

from trimtab.trace._format import (
    FORMAT_VERSION,
    IDENTITY,
    MEASURED,
    PLACE,
    RECORDS,
    TABLES,
    Level,
    part_name,
)
from trimtab.trace._shard import HEADER_LIMIT, encode_shard
from trimtab.trace._statistics import measure
from trimtab.trace._store import Store
from trimtab.trace._tensors import buffer, digest

_NAMES = tuple(IDENTITY)
_DTYPE, _SHAPE, _RECORD_ID = (_NAMES.index(name) for name in ("dtype", "shape", "record_id"))
_UNMEASURED = (None, None, None, None, None)


class Part:
    """Collects records, tokens and doses, and commits them: shard, tokens, dose, then the records that name them.

    Args:
        store: where the run lies.
        rank: whose sub-trace this is.
        number: number of the first part.
        level: what of a tensor is kept.
        limit: bytes of tensors and rows after which the part is committed.
        release: called with the bytes that are no longer held.
    """

    def __init__(
        self, store: Store, rank: int, number: int, level: Level, limit: int, release: Callable[[int], None]
    ) -> None:
        self.number = number
        self.committed_parts = 0
        self.committed_records = 0
        self._store, self._rank, self._level, self._limit, self._release = store, rank, level, limit, release
        self._clear()

    def _clear(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._tensors: list[torch.Tensor] = []
        self._measured: list[tuple[Any, ...]] = []
        self._tables: dict[str, list[tuple[Any, ...]]] = {"tokens": [], "dose": []}
        self._held = 0
        self._header = 0

    def add_record(self, row: tuple[Any, ...], tensor: torch.Tensor | None, known: str | None, cost: int) -> None:
        """Measure one record and keep it; commits first what is held when the limit is reached.

        Args:
            row: the identity columns.
            tensor: a snapshot; None when only `known` is kept.
            known: the digest, when it was computed already.
            cost: bytes that this record was counted with.
        """
        kept = cost
        if tensor is None:
            self._measured.append((known, *_UNMEASURED))
        else:
            size = tensor.nbytes
            name = digest(buffer(tensor), row[_DTYPE], row[_SHAPE])
            self._measured.append((name, *measure(tensor)))
            if self._level == "values":
                self._tensors.append(tensor)
            else:
                self._release(size)
                kept -= size
        self._rows.append(row)
        self._held += kept
        self._header += kept if tensor is None or self._level != "values" else kept - tensor.nbytes
        if self._held >= self._limit or self._header >= HEADER_LIMIT // 3:
            self.commit()

    def add_rows(self, table: str, rows: Sequence[tuple[Any, ...]], cost: int) -> None:
        """Keep rows of `tokens` or `dose`."""
        self._tables[table].extend(rows)
        self._held += cost
        if self._held >= self._limit:
            self.commit()

    def commit(self) -> None:
        """Write everything held, durable in this order: shard, tokens, dose, records."""
        if self._rows or any(self._tables.values()):
            self._write()
            self.number += 1
            self.committed_parts += 1
            self.committed_records += len(self._rows)
        held = self._held
        self._clear()
        self._release(held)

    def _write(self) -> None:
        frame = shard = shard_bytes = None
        if self._rows:
            columns = dict(zip(_NAMES, zip(*self._rows, strict=True), strict=True))
            columns.update(zip(MEASURED, zip(*self._measured, strict=True), strict=True))
            keys: list[str] | None = None
            if self._level == "values":
                shard = part_name(self._rank, "tensors", self.number)
                keys = [str(identity) for identity in columns["record_id"]]
                shard_bytes = self._store.put(shard, encode_shard(keys, self._tensors, columns))
            frame = records_frame(columns, shard, keys)
        for table, rows in self._tables.items():
            if rows:
                schema = TABLES[table]
                data = pl.DataFrame(rows, schema=schema, orient="row")
                self._store.put(part_name(self._rank, table, self.number), [encode_table(data)])
        if frame is not None:
            name = part_name(self._rank, "records", self.number)
            self._store.put(name, [encode_records(frame, shard=shard, shard_bytes=shard_bytes)])


def records_frame(
    columns: Mapping[str, Sequence[Any]], shard: str | None, keys: Sequence[str | None] | None
) -> pl.DataFrame:
    """Return the rows of a records part from its columns; a key that is None means that no values are stored."""
    count = len(columns["record_id"])
    keys = [None] * count if keys is None else keys
    series = [
        _series(name, columns[name], kind, count) for name, kind in itertools.chain(IDENTITY.items(), MEASURED.items())
    ]
    shards = [None if key is None else shard for key in keys]
    series.append(_series("shard", shards, PLACE["shard"], count))
    series.append(pl.Series("key", keys, dtype=PLACE["key"]))
    frame = pl.DataFrame(series)
    assert frame.schema == RECORDS, f"columns differ from the format: {frame.schema}"
    return frame


def encode_records(frame: pl.DataFrame, *, shard: str | None, shard_bytes: int | None) -> bytes:
    """Return a records part; its footer names its shard and the shard's size, so that opening a run reads no more."""
    last = frame["record_id"].max()
    return encode_table(frame, rows=frame.height, last=last, shard=shard, shard_bytes=shard_bytes)


def encode_table(frame: pl.DataFrame, **footer: Any) -> bytes:
    """Return a part as parquet; `footer` goes into its metadata as JSON."""
    stream = io.BytesIO()
    notes = json.dumps({"format_version": FORMAT_VERSION, **footer})
    frame.write_parquet(stream, compression="zstd", compression_level=1, metadata={"trimtab": notes})
    return stream.getvalue()


def _series(name: str, values: Sequence[Any], kind: Any, count: int) -> pl.Series:
    first = values[0]
    if not isinstance(kind, pl.List) and values.count(first) == count:
        return pl.Series(name, [first], dtype=kind).new_from_index(0, count)
    return pl.Series(name, values, dtype=kind)
