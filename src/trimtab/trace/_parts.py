"""The open part of a sub-trace: what the writer's thread has measured and not yet committed."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from trimtab.trace._tensors import Buffers, buffer, digest

_NAMES = tuple(IDENTITY)
_DTYPE, _SHAPE, _RECORD_ID = (_NAMES.index(name) for name in ("dtype", "shape", "record_id"))


class Part:
    """Collects records, tokens and doses; hands them, measured, to a second thread that commits them.

    Args:
        store: where the run lies.
        rank: whose sub-trace this is.
        number: number of the first part.
        level: what of a tensor is kept.
        limit: bytes of tensors and rows after which the part is committed.
        buffers: takes back the memory of committed snapshots.
        release: called with the bytes that are no longer held.
        fail: called at once with the error of a commit.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        number: int,
        level: Level,
        limit: int,
        buffers: Buffers,
        release: Callable[[int], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self.committed_records = 0
        self._store, self._rank, self._number, self._level, self._limit = store, rank, number, level, limit
        self._buffers, self._release, self._fail = buffers, release, fail
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="trimtab-trace-committer")
        self._running: Future[None] | None = None
        self._open = _Content(number)

    def add_record(
        self, row: tuple[Any, ...], tensor: torch.Tensor | None, known: tuple[Any, ...] | None, cost: int
    ) -> None:
        """Measure one record and keep it; commits what is held when the limit is reached.

        Args:
            row: the identity columns.
            tensor: a snapshot, whose values are kept; None when only `known` is.
            known: digest and statistics, when they were computed already.
            cost: bytes that this record was counted with.
        """
        content = self._open
        size = 0
        if tensor is None:
            assert known is not None
            content.measured.append(known)
        else:
            size = tensor.nbytes
            name = digest(buffer(tensor), row[_DTYPE], row[_SHAPE])
            content.measured.append((name, *measure(tensor)))
            content.tensors.append(tensor)
        content.rows.append(row)
        content.held += cost
        content.header += cost - size
        if content.held >= self._limit or content.header >= HEADER_LIMIT // 3:
            self.commit()

    def add_rows(self, table: str, rows: Sequence[tuple[Any, ...]], cost: int) -> None:
        """Keep rows of `tokens` or `dose`."""
        self._open.tables[table].extend(rows)
        self._open.held += cost
        if self._open.held >= self._limit:
            self.commit()

    def commit(self) -> None:
        """Hand everything held to the committing thread, after the commit before it has ended."""
        self.settle()
        if self._open.held:
            content, self._open = self._open, _Content(self._open.number + 1)
            self._running = self._committer.submit(self._write, content)

    def settle(self) -> None:
        """Return when everything handed over is on disk; raises what the commit raised."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def end(self) -> None:
        """End the committing thread."""
        self._committer.shutdown()

    def _write(self, content: _Content) -> None:
        try:
            write_part(self._store, self._rank, self._level, content)
        except BaseException as error:
            self._fail(error)
            raise
        self.committed_records += len(content.rows)
        self._buffers.give(content.tensors)
        self._release(content.held)


class _Content:
    """What becomes one part."""

    __slots__ = ("header", "held", "measured", "number", "rows", "tables", "tensors")

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: list[tuple[Any, ...]] = []
        self.tensors: list[torch.Tensor] = []
        self.measured: list[tuple[Any, ...]] = []
        self.tables: dict[str, list[tuple[Any, ...]]] = {"tokens": [], "dose": []}
        self.held = 0
        self.header = 0


def write_part(store: Store, rank: int, level: Level, content: _Content) -> None:
    """Make a part durable, in this order: shard, tokens, dose, and last the records that name the shard."""
    frame = shard = shard_bytes = None
    if content.rows:
        columns = dict(zip(_NAMES, zip(*content.rows, strict=True), strict=True))
        columns.update(zip(MEASURED, zip(*content.measured, strict=True), strict=True))
        keys: list[str] | None = None
        if level == "values":
            shard = part_name(rank, "tensors", content.number)
            keys = [str(identity) for identity in columns["record_id"]]
            shard_bytes = store.put(shard, encode_shard(keys, content.tensors, columns))
        frame = records_frame(columns, shard, keys)
    for table, rows in content.tables.items():
        if rows:
            data = pl.DataFrame(rows, schema=TABLES[table], orient="row")
            store.put(part_name(rank, table, content.number), [encode_table(data)])
    if frame is not None:
        records = encode_records(frame, shard=shard, shard_bytes=shard_bytes)
        store.put(part_name(rank, "records", content.number), [records])


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
    if values.count(first) == count:
        return pl.Series(name, [first], dtype=kind).new_from_index(0, count)
    if isinstance(kind, pl.List):  # one conversion of all lists is twenty times faster than one per list
        return pl.Series(name, [json.dumps(values)]).str.json_decode(pl.List(kind)).explode()
    return pl.Series(name, values, dtype=kind)
