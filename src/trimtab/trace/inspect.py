"""Looking at runs: what one holds, one record of it, and what one would take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch

from trimtab.errors import TraceError
from trimtab.trace._format import FOLDERS, MANIFEST, Level, rank_folder
from trimtab.trace._store import Store, open_store
from trimtab.trace.reader import Trace

# Bytes per record in a part and in the metadata of a shard, without names and positions; measured, rounded up.
_INDEX_BYTES = 120
_HEADER_BYTES = 450


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordGroup:
    """Records that share phase, site, kind, edit, dtype and configuration; `name` stands for a missing site."""

    phase: str
    site: str
    kind: str
    edit: str
    config: str
    dtype: str
    records: int
    steps: int
    shapes: int
    nan_count: int
    inf_count: int
    absmax: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What one run holds."""

    format_version: int = 1
    path: str
    kind: str
    level: str
    created: str
    ranks: tuple[int, ...]
    records: int
    tokens: int
    doses: int
    bytes: int
    """Bytes of all its files."""
    configs: tuple[str, ...]
    requests: int
    plan: Any
    groups: tuple[RecordGroup, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordDetail:
    """One record: all its columns, and its first values row by row (None when they were not kept)."""

    format_version: int = 1
    path: str
    columns: dict[str, Any]
    values: tuple[Any, ...] | None
    values_left_out: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a run would take on disk."""

    records: int
    tensor_bytes: int
    index_bytes: int
    free_bytes: int | None
    """Free space where it would lie; None where that is not known."""

    @property
    def total_bytes(self) -> int:
        """Bytes on disk, about."""
        return self.tensor_bytes + self.index_bytes

    @property
    def fits(self) -> bool:
        """Whether the free space is enough."""
        return self.free_bytes is None or self.total_bytes <= self.free_bytes


def ls(path: str | os.PathLike[str], **columns: Any) -> Listing:
    """Return what a run holds, its records in groups.

    Args:
        path: the run.
        columns: what `Trace.filter` takes; only these records are counted.

    Raises:
        TraceError: no run at `path`; names the runs that lie in its directories.
        InputError: no such column.
    """
    store = open_store(path)
    if store.size(MANIFEST) is None:
        inside = [name for name in sorted(store.names(".")) if store.size(f"{name}/{MANIFEST}") is not None]
        if inside:
            raise TraceError(f"{store.root} is no run but holds some: {', '.join(inside[:20])}; give one of them")
    trace = Trace.open(path)
    chosen = trace.filter(**columns) if columns else trace
    keys = ("phase", "site", "kind", "edit", "config", "dtype")
    groups = (
        chosen.scan.with_columns(pl.coalesce("site", "name").alias("site"))
        .group_by(keys, maintain_order=True)
        .agg(
            pl.len().alias("records"),
            pl.col("step").n_unique().alias("steps"),
            pl.col("shape").n_unique().alias("shapes"),
            pl.col("nan_count").sum(),
            pl.col("inf_count").sum(),
            pl.col("absmax").max(),
        )
        .collect()
    )
    return Listing(
        path=trace.path,
        kind=trace.manifest["kind"],
        level=trace.manifest["level"],
        created=trace.manifest["created"],
        ranks=trace.ranks,
        records=int(groups["records"].sum()),
        tokens=chosen.tokens.height,
        doses=chosen.dose.height,
        bytes=_size(store, trace.ranks) or (trace.manifest["plan"] or {}).get("bytes", 0),
        configs=chosen.configs(),
        requests=len(chosen.requests()),
        plan=trace.manifest["plan"],
        groups=tuple(RecordGroup(**row) for row in groups.iter_rows(named=True)),
        problems=trace.problems,
    )


def show(path: str | os.PathLike[str], record_id: int, *, limit: int = 64) -> RecordDetail:
    """Return one record with its first `limit` values.

    Raises:
        TraceError: no such run or record.
        TraceCorruptError: its shard is damaged.
    """
    trace = Trace.open(path)
    found = trace.filter(record_id=record_id).index
    if not found.height:
        raise TraceError(f"{trace.path} has no record {record_id}; trace ls lists what it has")
    columns = found.row(0, named=True)
    if columns["shard"] is None:
        return RecordDetail(path=trace.path, columns=columns, values=None, values_left_out=0)
    flat = trace.tensor(record_id).reshape(-1)
    return RecordDetail(
        path=trace.path,
        columns=columns,
        values=tuple(_readable(flat[:limit])),
        values_left_out=max(0, flat.numel() - limit),
    )


def estimate(
    path: str | os.PathLike[str], shapes: Iterable[tuple[Sequence[int], torch.dtype]], level: Level = "values"
) -> Estimate:
    """Return what records of these shapes and dtypes would take at `path`, before anything is written.

    Args:
        path: where the run would lie.
        shapes: shape and dtype of every record.
        level: what would be kept of them.
    """
    records = stored = 0
    for shape, dtype in shapes:
        records += 1
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        stored += size
    values = level == "values"
    return Estimate(
        records=records,
        tensor_bytes=stored if values else 0,
        index_bytes=records * (_INDEX_BYTES + _HEADER_BYTES * values),
        free_bytes=open_store(path).free(),
    )


def _size(store: Store, ranks: Iterable[int]) -> int:
    folders = [f"{rank_folder(rank)}/{folder}" for rank in ranks for folder in FOLDERS]
    return sum(store.size(f"{folder}/{name}") or 0 for folder in folders for name in store.names(folder))


def _readable(values: torch.Tensor) -> list[Any]:
    try:
        listed: list[Any] = values.tolist()
    except (RuntimeError, NotImplementedError):  # bits and sub-byte dtypes have no Python numbers
        listed = values.view(torch.uint8).tolist()
    return [str(one) if isinstance(one, complex) else one for one in listed]
