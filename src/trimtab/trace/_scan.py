"""What lies in a run's directory: its committed parts, and everything that is not as it should be."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from trimtab.trace._format import (
    CLOSED,
    FOLDERS,
    LOCK,
    RECORD_ID_BASE,
    part_number,
    rank_folder,
    rank_of,
)
from trimtab.trace._store import Store

Trouble = Literal[
    "writing", "killed", "interrupted", "leftover", "uncommitted", "corrupt part", "corrupt shard", "missing"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is not as a finished run has it; `name` is a file relative to the run."""

    trouble: Trouble
    rank: int
    name: str
    text: str

    @property
    def damaged(self) -> bool:
        """Whether committed data is lost, as opposed to a run that merely ended early."""
        return self.trouble in ("corrupt part", "corrupt shard", "missing")


@dataclass(kw_only=True, slots=True)
class Scan:
    """Readable parts by table, in order of rank and number, and the problems."""

    parts: dict[str, list[str]] = field(default_factory=lambda: {"records": [], "tokens": [], "dose": []})
    footers: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


def scan_run(store: Store, only: int | None = None, *, locked: bool = False) -> Scan:
    """Look at every rank of a run, or at one; reads footers and sizes, no rows.

    Args:
        store: where the run lies.
        only: one rank; None looks at all.
        locked: the caller holds the locks, so that no other writer can be at work.
    """
    scan = Scan()
    found = (rank_of(name) for name in store.names("."))
    for rank in sorted(rank for rank in found if rank is not None and only in (None, rank)):
        scan.ranks.append(rank)
        holder = None if locked else store.locked_by(f"{rank_folder(rank)}/{LOCK}")
        _scan_rank(store, rank, holder, scan)
    return scan


def source(store: Store, name: str) -> Path | io.BytesIO:
    """Return what polars reads a part from."""
    return Path(store.root, name) if store.local else io.BytesIO(store.read(name))


def last_numbers(store: Store, rank: int) -> tuple[int, int]:
    """Return the highest part number and the highest record id of a rank (-1 and the one before its first)."""
    folder = rank_folder(rank)
    numbers = (part_number(name) for table in FOLDERS for name in store.names(f"{folder}/{table}"))
    scan = scan_run(store, rank, locked=True)
    ids = (footer.get("last") for footer in scan.footers.values())
    return (
        max((number for number in numbers if number is not None), default=-1),
        max((one for one in ids if one is not None), default=rank * RECORD_ID_BASE - 1),
    )


def _scan_rank(store: Store, rank: int, holder: str | None, scan: Scan) -> None:
    folder = rank_folder(rank)
    names = {table: sorted(store.names(f"{folder}/{table}")) for table in FOLDERS}
    problems: list[Problem] = []

    def report(trouble: Trouble, name: str, text: str) -> None:
        problems.append(Problem(trouble=trouble, rank=rank, name=name, text=f"{name or folder}: {text}"))

    closed = _read_closed(store, f"{folder}/{CLOSED}")
    if closed is None and holder is not None:
        report("writing", "", f"{holder} still writes here; what it has not committed is not shown")
    elif closed is None:
        report("killed", "", "the writer ended without closing; what it had not committed is lost: run trace repair")
    elif closed.get("interrupted"):
        report("interrupted", "", f"the run ended early: {closed['interrupted']}")

    used: set[str] = set()
    known: set[int] = set()
    for table in ("records", "tokens", "dose"):
        for name in _parts(names[table]):
            path = f"{folder}/{table}/{name}"
            footer = _read_footer(store, path)
            if table == "records":
                known.add(_number(name))
            if footer is None:
                report("corrupt part", path, "truncated or corrupt; run trace repair, which rebuilds it if it can")
                continue
            scan.parts[table].append(path)
            scan.footers[path] = footer
            if table == "records":
                used.update(_check_shard(store, footer, report))
    _check_unused(folder, names["tensors"], used, known, holder, report)
    if holder is None:
        for table in FOLDERS:
            for name in names[table]:
                if name.startswith("."):
                    report("leftover", f"{folder}/{table}/{name}", "an unfinished file; trace repair deletes it")
    if closed is not None:
        _check_counts(
            closed, names, [scan.footers[part] for part in scan.parts["records"] if part.startswith(folder)], report
        )
    scan.problems.extend(problems)


def _parts(names: list[str]) -> Iterator[str]:
    return (name for name in names if part_number(name) is not None)


def _number(name: str) -> int:
    number = part_number(name)
    assert number is not None
    return number


def _check_shard(store: Store, footer: dict[str, Any], report: Any) -> Iterator[str]:
    shard, expected = footer.get("shard"), footer.get("shard_bytes")
    if shard is None:
        return
    size = store.size(shard)
    if size is None:
        report("missing", shard, "the shard is missing; its records have no values any more: restore it from a copy")
    elif size != expected:
        report("corrupt shard", shard, f"truncated or changed: {size} bytes, committed were {expected}")
    yield shard


def _check_unused(
    folder: str, names: list[str], used: set[str], known: set[int], holder: str | None, report: Any
) -> None:
    replaced = {_file_number(name) for name in used}
    for name in _parts(names):
        path = f"{folder}/tensors/{name}"
        if path in used or holder is not None:
            continue
        if _number(name) in replaced:
            report("leftover", path, "a shard that was replaced; trace repair deletes it")
        elif _number(name) not in known:  # the shard of a corrupt part was reported with it
            report("uncommitted", path, "a shard without its part; trace repair rebuilds the part")


def _check_counts(
    closed: dict[str, Any], names: dict[str, list[str]], footers: list[dict[str, Any]], report: Any
) -> None:
    for table in ("records", "tokens", "dose"):
        there, expected = sum(1 for _ in _parts(names[table])), closed.get("parts", {}).get(table, 0)
        if there < expected:
            report(
                "missing", "", f"{expected - there} of {expected} {table} parts are missing; restore them from a copy"
            )
    rows, expected = sum(footer.get("rows", 0) for footer in footers), closed.get("records", 0)
    if rows < expected:
        report("missing", "", f"{expected - rows} of {expected} records are missing or unreadable")


def _read_closed(store: Store, name: str) -> dict[str, Any] | None:
    if store.size(name) is None:
        return None
    try:
        return dict(json.loads(store.read(name)))
    except (ValueError, TypeError):
        return None


def _read_footer(store: Store, name: str) -> dict[str, Any] | None:
    try:
        footer = dict(json.loads(pl.read_parquet_metadata(source(store, name))["trimtab"]))
    except (pl.exceptions.PolarsError, OSError, KeyError, ValueError, TypeError):
        return None
    shard = footer.get("shard")
    foreign = shard is not None and _file_number(shard) != _file_number(name)
    return None if foreign else footer


def _file_number(path: str) -> int | None:
    return part_number(path.rpartition("/")[2])
