"""Opening a run for writing: its manifest, the lock of one rank, and where a resumed run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab._base import jsonio, provenance
from trimtab.errors import InputError, TraceExistsError
from trimtab.trace._format import (
    CLOSED,
    FOLDERS,
    LEVELS,
    LOCK,
    MANIFEST,
    RECORD_ID_BASE,
    Level,
    make_manifest,
    part_number,
    rank_folder,
    rank_of,
    read_manifest,
)
from trimtab.trace._scan import last_numbers
from trimtab.trace._shard import data_bytes
from trimtab.trace._store import Lock, Store
from trimtab.trace.repair import repair_rank

_COMPARED = ("kind", "level", "plan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A sub-trace that this process may write.

    `number` is the first free part, `order` the first free running number, `stored` the bytes of tensors there are.
    """

    lock: Lock
    number: int
    order: int
    stored: int


def open_session(
    store: Store,
    *,
    kind: str,
    level: Level,
    plan: Mapping[str, Any] | None,
    origin: Mapping[str, Any] | None,
    rank: int,
    resume: bool,
) -> Session:
    """Create a run, join it as another rank, or resume it.

    Raises:
        InputError: an unknown level, a negative rank.
        TraceExistsError: the place is taken.
        TraceLockedError: another process writes this rank.
        TraceWriteError: the place cannot be written.
    """
    if level not in LEVELS:
        raise InputError(f"level {level!r}: choose one of {', '.join(LEVELS)}")
    if not isinstance(rank, int) or not 0 <= rank < 1 << 20:
        raise InputError(f"rank {rank!r}: a number from 0 to {(1 << 20) - 1} was expected")
    _claim(store, kind, level, plan, origin)
    folder = rank_folder(rank)
    taken = store.size(f"{folder}/{CLOSED}") is not None or any(
        store.names(f"{folder}/{part}") for part in FOLDERS if store.names(folder)
    )
    store.make(folder)
    lock = store.lock(f"{folder}/{LOCK}")
    try:
        if taken and not resume:
            raise TraceExistsError(
                f"{store.root} already holds {folder} of a {kind!r} run; choose another directory, or resume=True "
                "continues it"
            )
        for name in FOLDERS:
            store.make(f"{folder}/{name}")
        if not taken:
            return Session(lock=lock, number=0, order=0, stored=0)
        repair_rank(store, rank)
        store.delete(f"{folder}/{CLOSED}")
        number, last = last_numbers(store, rank)
        stored = sum(data_bytes(store, f"{folder}/tensors/{name}") for name in store.names(f"{folder}/tensors"))
        return Session(lock=lock, number=number + 1, order=last - rank * RECORD_ID_BASE + 1, stored=stored)
    except BaseException:
        lock.release()
        raise


def close_session(store: Store, rank: int, session: Session, records: int, interrupted: str | None) -> None:
    """Say on disk how many parts and records this rank has, and release it."""
    folder = rank_folder(rank)
    tables = [table for table in FOLDERS if table != "tensors"]  # a shard may go when it is pruned
    parts = {table: sum(part_number(name) is not None for name in store.names(f"{folder}/{table}")) for table in tables}
    counts = {"parts": parts, "records": records, "interrupted": interrupted}
    try:
        store.put(f"{folder}/{CLOSED}", [jsonio.dumps(counts).encode()])
    finally:
        session.lock.release()


def _claim(
    store: Store, kind: str, level: Level, plan: Mapping[str, Any] | None, origin: Mapping[str, Any] | None
) -> None:
    """Write the manifest, or check that the one found describes the same run."""
    if store.size(MANIFEST) is None:
        made = make_manifest(kind, level, plan, provenance.collect() if origin is None else origin)
        _refuse_foreign(store)
        store.make(".")
        if store.put_new(MANIFEST, json.dumps(made, indent=1, ensure_ascii=False).encode()):
            return
    found = read_manifest(store)
    wanted = make_manifest(kind, level, plan, {})
    for key in _COMPARED:
        if found[key] != wanted[key]:
            raise TraceExistsError(
                f"{store.root} already holds a run whose {_difference(key, found[key], wanted[key])}; "
                "choose another directory, or give the same plan with resume=True"
            )


def _refuse_foreign(store: Store) -> None:
    if store.local and store.size(".") is not None:
        there = (name for name in store.names(".") if not name.startswith(".") and rank_of(name) is None)
        others = sorted(name for name in there if name != MANIFEST)  # another rank may just have written that
        if others:
            raise TraceExistsError(
                f"{store.root} exists and is no trace: it holds {', '.join(others[:5])}; choose a new directory"
            )


def _difference(key: str, found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        return f"{key}[{names[0]!r}] is {found.get(names[0])!r}, not {wanted.get(names[0])!r}"
    return f"{key} is {found!r}, not {wanted!r}"
