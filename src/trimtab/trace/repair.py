"""Mending, checking and thinning a run on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from trimtab._base import jsonio
from trimtab.errors import InputError, TraceCorruptError
from trimtab.sites import Site, SitePattern
from trimtab.trace._format import CLOSED, IDENTITY, LOCK, MEASURED, part_name, part_number, rank_folder, read_manifest
from trimtab.trace._parts import encode_records, records_frame
from trimtab.trace._scan import Problem, scan_run, source
from trimtab.trace._shard import ShardHeader, encode_shard
from trimtab.trace._store import Store, open_store
from trimtab.trace._values import Values
from trimtab.trace.reader import Trace, predicates


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairResult:
    """What `repair` did; names are relative to the run."""

    format_version: int = 1
    path: str
    rebuilt: tuple[str, ...]
    """Parts of the index that were written again from their shards."""
    records: int
    """Records in the rebuilt parts."""
    deleted: tuple[str, ...]
    """Unfinished or replaced files."""
    lost: tuple[str, ...]
    """What cannot be rebuilt, with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorruptRecord:
    """A record whose stored bytes are not those that were committed."""

    record_id: int
    name: str
    shard: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyResult:
    """What `verify` read: every record is either checked, corrupt, or without values."""

    format_version: int = 1
    path: str
    records: int
    checked: int
    without_values: int
    corrupt: tuple[CorruptRecord, ...]
    problems: tuple[str, ...]
    passed: bool
    """Whether every stored byte is as committed and nothing committed is missing; a run that ended early can pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneResult:
    """What `prune` removed, or would remove."""

    format_version: int = 1
    path: str
    records: int
    """Records whose values were removed; their rows, digests and statistics stay."""
    bytes_freed: int
    dry_run: bool


def repair(path: str | os.PathLike[str]) -> RepairResult:
    """Mend what a killed writer or a damaged disk left: rebuild parts from shards, delete unfinished files.

    Raises:
        TraceError: no run at `path`.
        TraceLockedError: a writer still runs.
    """
    store = open_store(path)
    read_manifest(store)
    results = []
    for rank in scan_run(store).ranks:
        lock = store.lock(f"{rank_folder(rank)}/{LOCK}")
        try:
            results.append(repair_rank(store, rank))
        finally:
            lock.release()
    return RepairResult(
        path=store.root,
        rebuilt=tuple(name for one in results for name in one.rebuilt),
        records=sum(one.records for one in results),
        deleted=tuple(name for one in results for name in one.deleted),
        lost=tuple(text for one in results for text in one.lost),
    )


def repair_rank(store: Store, rank: int) -> RepairResult:
    """`repair` for one rank whose lock the caller holds."""
    rebuilt: list[str] = []
    deleted: list[str] = []
    lost: dict[str, str] = {}
    records = 0
    for problem in scan_run(store, rank, locked=True).problems:
        if problem.trouble == "leftover":
            store.delete(problem.name)
            deleted.append(problem.name)
        elif problem.trouble in ("uncommitted", "corrupt part"):
            try:
                name, count = _rebuild(store, rank, problem)
            except TraceCorruptError as error:
                lost[problem.name] = str(error)
                continue
            rebuilt.append(name)
            records += count
    if store.size(f"{rank_folder(rank)}/{CLOSED}") is None:
        _mark(store, rank)
    remaining = [one for one in scan_run(store, rank, locked=True).problems if one.damaged and one.name not in lost]
    return RepairResult(
        path=store.root,
        rebuilt=tuple(rebuilt),
        records=records,
        deleted=tuple(deleted),
        lost=(*lost.values(), *(problem.text for problem in remaining)),
    )


def verify(path: str | os.PathLike[str]) -> VerifyResult:
    """Read every stored byte again and compare its digest with the committed one.

    Raises:
        TraceError: no run at `path`.
    """
    trace = Trace.open(path)
    corrupt: list[CorruptRecord] = []
    checked = without = 0
    rows = trace.scan.select("record_id", "name", "digest", "shard").collect()
    for record_id, name, expected, shard in rows.iter_rows():
        if shard is None:
            without += 1
            continue
        try:
            found = trace.rehash(record_id)
            same = expected in (found, None)  # nobody hashed a foreign dump when it was indexed
            reason = None if same else f"its bytes hash to {found}, committed was {expected}"
        except TraceCorruptError as error:
            reason = str(error)
        if reason is None:
            checked += 1
        else:
            corrupt.append(CorruptRecord(record_id=record_id, name=name, shard=shard, reason=reason))
    corrupt.extend(_index_differences(open_store(path)))
    return VerifyResult(
        path=trace.path,
        records=rows.height,
        checked=checked,
        without_values=without,
        corrupt=tuple(corrupt),
        problems=trace.problems,
        passed=not corrupt and not trace.damaged,
    )


def prune(
    path: str | os.PathLike[str],
    *,
    sites: str | Iterable[str] | None = None,
    drop: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> PruneResult:
    """Remove stored values that are not needed; the rows of their records, digests and statistics stay.

    Args:
        path: the run.
        sites: patterns of the sites to keep, such as "layers.*.resid_post"; the values of records at other sites go,
            those of records without a site stay.
        drop: column=value as in `Trace.filter`; the values of the records that match go. With `sites`, only of those
            at other sites.
        dry_run: only count.

    Raises:
        InputError: neither `sites` nor `drop`, or one that names nothing.
        TraceLockedError: a writer still runs.
    """
    if sites is None and not drop:
        raise InputError("prune needs to know what goes: sites= names what stays, drop= what goes")
    conditions = predicates(drop or {})
    if sites is not None:
        conditions.append(_elsewhere(path, sites))
    store = open_store(path)
    read_manifest(store)
    scan = scan_run(store)
    records = freed = 0
    for rank in scan.ranks:
        lock = store.lock(f"{rank_folder(rank)}/{LOCK}")
        try:
            for name in scan.parts["records"]:
                if name.startswith(f"{rank_folder(rank)}/") and scan.footers[name].get("shard"):
                    counted = _prune_part(store, name, scan.footers[name]["shard"], conditions, dry_run)
                    records, freed = records + counted[0], freed + counted[1]
        finally:
            lock.release()
    return PruneResult(path=store.root, records=records, bytes_freed=freed, dry_run=dry_run)


def _elsewhere(path: str | os.PathLike[str], sites: str | Iterable[str]) -> pl.Expr:
    """Return the condition for records at sites that no pattern matches."""
    listed = sites.replace(",", " ").split() if isinstance(sites, str) and "{" not in sites else sites
    patterns = [SitePattern.parse(one) for one in ([listed] if isinstance(listed, str) else listed)]
    there = Trace.open(path).sites()
    kept = [name for name in there if any(pattern.matches(Site.parse(name)) for pattern in patterns)]
    if not kept:
        raise InputError(f"sites={sites!r} matches none of {', '.join(there[:8]) or 'no sites'}; everything would go")
    return pl.col("site").is_not_null() & ~pl.col("site").is_in(kept)


def _prune_part(store: Store, name: str, shard: str, conditions: Iterable[pl.Expr], dry_run: bool) -> tuple[int, int]:
    frame = pl.read_parquet(source(store, name))
    chosen = frame.select(
        pl.all_horizontal(pl.col("shard").is_not_null(), *conditions).fill_null(False).alias("chosen")
    )["chosen"].to_list()
    if not any(chosen):
        return 0, 0
    rows = list(zip(frame["key"], frame["dtype"], frame["shape"].to_list(), chosen, strict=True))
    values = Values(store)
    entries = [(values.header(shard).locate(key, dtype, shape), drop) for key, dtype, shape, drop in rows if key]
    freed = sum(entry.stop - entry.start for entry, drop in entries if drop)
    if dry_run:
        return sum(chosen), freed
    keys = [None if drop else key for key, _, _, drop in rows]
    columns = {column: frame[column].to_list() for column in (*IDENTITY, *MEASURED)}
    tensors = [values.tensor(shard, key, dtype, shape) for key, dtype, shape, drop in rows if key and not drop]
    replacement = _next_shard(shard)
    size = store.put(replacement, encode_shard(keys, tensors, columns))
    thinned = records_frame(columns, replacement, keys)
    store.put(name, [encode_records(thinned, shard_bytes=size, shard=replacement)])  # from here on it is pruned
    store.delete(shard)
    return sum(chosen), freed


def _next_shard(name: str) -> str:
    """`part-00000.safetensors`, then `part-00000.1.safetensors`: the part decides which of two counts."""
    stem = name.removesuffix(".safetensors")
    base, _, generation = stem.rpartition(".")
    return f"{base}.{int(generation) + 1}.safetensors" if generation.isdigit() and base else f"{stem}.1.safetensors"


def _rebuild(store: Store, rank: int, problem: Problem) -> tuple[str, int]:
    number = part_number(problem.name.rpartition("/")[2])
    assert number is not None
    folder = f"{rank_folder(rank)}/tensors"
    if "/records/" not in problem.name and problem.trouble == "corrupt part":
        raise TraceCorruptError(f"{problem.name} cannot be rebuilt: tokens and doses are in no shard")
    shards = sorted(
        (name for name in store.names(folder) if part_number(name) == number), key=lambda one: (len(one), one)
    )
    if not shards:
        raise TraceCorruptError(f"{problem.name} cannot be rebuilt: it has no shard")
    shard = f"{folder}/{shards[-1]}"
    header = ShardHeader(store, shard)
    keys, columns = header.identity()
    name = part_name(rank, "records", number)
    frame = records_frame(columns, shard, keys)
    store.put(name, [encode_records(frame, shard_bytes=header.size, shard=shard)])
    return name, frame.height


def _mark(store: Store, rank: int) -> None:
    """Close a killed rank with what there is of it, saying how it ended."""
    scan = scan_run(store, rank, locked=True)
    counts = {
        "parts": {table: len(names) for table, names in scan.parts.items()},
        "records": sum(scan.footers[name].get("rows", 0) for name in scan.parts["records"]),
        "interrupted": "the writer was killed; repaired",
    }
    store.put(f"{rank_folder(rank)}/{CLOSED}", [jsonio.dumps(counts).encode()])


def _index_differences(store: Store) -> list[CorruptRecord]:
    """Compare every row of the index with its copy in the shard."""
    found: list[CorruptRecord] = []
    scan = scan_run(store)
    for name in scan.parts["records"]:
        shard = scan.footers[name].get("shard")
        if shard is None or store.size(shard) is None:
            continue
        frame = pl.read_parquet(source(store, name))
        try:
            keys, columns = ShardHeader(store, shard).identity()
        except TraceCorruptError:
            continue  # its records were reported when their bytes were read
        copy = records_frame(columns, shard, keys)
        if frame.equals(copy):
            continue
        reason = f"its row in {name} differs from the copy in the shard"
        pairs = zip(frame.iter_rows(named=True), copy.iter_rows(named=True), strict=False)
        differing = [row for row, other in pairs if str(row) != str(other)]
        found.extend(
            CorruptRecord(record_id=row["record_id"], name=row["name"], shard=shard, reason=reason)
            for row in differing or frame.head(1).iter_rows(named=True)
        )
    return found
