"""The index of a foreign dump: one row per tensor, with where its values lie; reads structure, no values."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from trimtab.errors import InputError, TraceError
from trimtab.trace._format import RECORD_ID_BASE, RECORDS
from trimtab.trace._tensors import dtype_text
from trimtab.trace.foreign._archive import Refused
from trimtab.trace.foreign._gradients import give_tags
from trimtab.trace.foreign._layout import File, Found
from trimtab.trace.foreign._pattern import NUMBERS
from trimtab.trace.foreign._payload import encode_key, leaves, read_payload
from trimtab.trace.foreign._row import Row
from trimtab.trace.foreign._sglang import Tags, place, read_tags

_CAUSAL = ("inference", "fwd_only", "fwd_bwd")
_MADE_UP = {"rids": "request ids, which every run makes up anew"}
_LISTED = 10_000


@dataclass(kw_only=True, slots=True)
class Index:
    """Rows of the format's columns, what could not be read, and what is to be said about it."""

    frame: pl.DataFrame
    plan: dict[str, Any]
    unreadable: dict[str, str]
    """File -> why; its record is in the frame, and reading it raises the reason."""
    problems: list[str]


@dataclass(kw_only=True, slots=True)
class _Build:
    rows: list[Row] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    bytes: int = 0
    counters: dict[tuple[str, int | None, int | None, int], Counter[int]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    """How often each dump_index stands, by phase, engine, rollout and rank."""


def build_index(root: str, found: Found, phase: str = "inference") -> Index:
    """Read the structure of every file.

    Args:
        root: the directory.
        found: its files.
        phase: phase of files whose place names none.

    Raises:
        TraceError: files that no rule tells apart.
    """
    build = _Build()
    for file in found.files:
        _add(build, Path(root), file, phase)
    _join_engines(build.rows)
    _join_rollouts(build)
    build.rows.sort(key=_order)
    build.notes += give_tags(build.rows)
    _number_calls(build.rows)
    if found.layout == "files":
        _check_twins(root, build.rows)
    else:
        _check_counters(build)
    if build.unreadable:
        first = next(iter(build.unreadable))
        count = len(build.unreadable)
        build.problems.insert(
            0, f"{count} of {len(found.files)} files cannot be read: {first}: {build.unreadable[first]}"
        )
    return Index(
        frame=_frame(build.rows), plan=_plan(found, build), unreadable=build.unreadable, problems=build.problems
    )


def _add(build: _Build, root: Path, file: File, phase: str) -> None:
    path = file.path
    try:
        path.encode()
        build.bytes += (root / path).stat().st_size
        payload = read_payload(root / path)
        if file.stem:
            payload, prefix, meta = _unwrap(payload)
            tags = read_tags(file.stem, meta)
        else:
            prefix, tags = (), _plain_tags(file)
        if tags.name in _MADE_UP and file.stem:
            build.skipped.append({"file": path, "name": tags.name, "reason": _MADE_UP[tags.name]})
            _count(build, file, phase, tags)
            return
        found = list(leaves(payload, prefix))
        _count(build, file, phase, tags)
    except (Refused, InputError, OSError, UnicodeEncodeError) as error:
        build.rows.append(_unreadable(build, file, phase, error))
        return
    for leaf in found:
        inner = leaf.key[len(prefix) :]
        row = _row(file, tags, phase, ".".join(str(step) for step in inner))
        if leaf.tensor is None:
            build.skipped.append({"file": path, "name": row.name, "reason": leaf.reason})
        else:
            row.dtype, row.shape = dtype_text(leaf.tensor.dtype), list(leaf.tensor.shape)
            row.shard = path
        row.key = encode_key(leaf.key)
        build.rows.append(row)


def _count(build: _Build, file: File, phase: str, tags: Tags) -> None:
    if tags.dump_index is not None:
        build.counters[file.phase or phase, file.engine, file.rollout, tags.rank][tags.dump_index] += 1


def _unwrap(payload: Any) -> tuple[Any, tuple[str, ...], dict[str, Any]]:
    """Take the value and its metadata apart; files of the first era are the bare value."""
    if isinstance(payload, dict) and "value" in payload:
        meta = payload.get("meta", {})
        return payload["value"], ("value",), meta if isinstance(meta, dict) else {}
    return payload, (), {}


def _plain_tags(file: File) -> Tags:
    numbers = {key: int(text) for key, text in file.fields.items() if key in NUMBERS}
    if numbers.get("rank", 0) >= 1 << 20 or any(number >= 1 << 63 for number in numbers.values()):
        raise InputError(f"{file.fields}: a number is too large")
    return Tags(
        step=numbers.get("step", 0),
        micro_step=numbers.get("micro_step", 0),
        rank=numbers.get("rank", 0),
        name=file.fields.get("name", ""),
        layer=numbers.get("layer"),
        ranks={key: number for key, number in numbers.items() if key.endswith("_rank")},
    )


def _row(file: File, tags: Tags, phase: str, inner: str) -> Row:
    row = Row(file=file, tags=tags, phase=file.phase or file.fields.get("phase") or phase, inner=inner)
    if file.stem:
        row.site, row.name, row.kind, row.layer = place(tags.name, tags.layer)
        if inner:
            row.site, row.name = None, f"{row.name}.{inner}"
    else:
        row.name = ".".join(part for part in (tags.name, inner) if part) or Path(file.path).stem
        row.layer = tags.layer
    row.rank, row.step, row.micro_step = tags.rank, tags.step, tags.micro_step
    row.call_index = int(file.fields.get("call_index", 0))
    return row


def _unreadable(build: _Build, file: File, phase: str, error: Exception) -> Row:
    """A record that says why there is no tensor; the name of the file tells as much as it can."""
    text = file.path.encode("utf-8", "backslashreplace").decode()
    reason = "its name is no UTF-8 text" if isinstance(error, UnicodeEncodeError) else str(error)
    build.unreadable[text] = reason
    try:
        tags = read_tags(file.stem, {}) if file.stem else _plain_tags(file)
        _count(build, file, phase, tags)
    except (InputError, ValueError):
        tags = Tags(name=file.path)
    row = _row(file, tags, phase, "")
    row.name = row.name.encode("utf-8", "backslashreplace").decode()
    row.site = None if text != file.path else row.site
    row.shard, row.key = text, encode_key(())
    return row


def _join_engines(rows: list[Row]) -> None:
    """Number the processes of several engines through; they are data-parallel copies."""
    engines = [row for row in rows if row.file.engine is not None]
    width = max((row.rank for row in engines), default=0) + 1
    if len({row.file.engine for row in engines}) > 1:
        for row in engines:
            engine = row.file.engine or 0
            row.rank += engine * width
            if row.tags.sizes.get("dp", 1) == 1:
                row.tags.ranks["dp_rank"] = engine


def _join_rollouts(build: _Build) -> None:
    """Where a phase has several rollouts, the rollout is the step and the dump's own step the micro step."""
    rollouts: dict[str, set[int]] = defaultdict(set)
    for row in build.rows:
        if row.file.rollout is not None:
            rollouts[row.phase].add(row.file.rollout)
    for phase, numbers in rollouts.items():
        if len(numbers) > 1:
            build.notes.append(f"{phase} has {len(numbers)} rollouts: step is the rollout, micro_step the dump's step")
    for row in build.rows:
        if row.file.rollout is not None and len(rollouts[row.phase]) > 1:
            row.step, row.micro_step = row.file.rollout, row.step


def _order(row: Row) -> tuple[Any, ...]:
    phase = row.phase.partition(":")[0]
    causal = _CAUSAL.index(phase) if phase in _CAUSAL else len(_CAUSAL)
    index = row.tags.dump_index
    place = (row.step, row.micro_step) if index is None else (row.file.rollout or 0, index)
    return (row.rank, causal, row.phase, *place, row.file.path)


def _number_calls(rows: list[Row]) -> None:
    """Count how often each tensor came before in its step; a gradient keeps the number of its forward call."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        if row.file.stem and row.forward is None:
            row.call_index = seen[row.identity]
            seen[row.identity] += 1
    for row in rows:
        if row.forward is not None:
            row.call_index = row.forward.call_index


def _check_twins(root: str, rows: list[Row]) -> None:
    """Refuse plain files that would be one record.

    Raises:
        TraceError: naming two of them.
    """
    seen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        other = seen.setdefault((*row.identity, row.call_index, row.tags.ranks.get("tp_rank")), row)
        if other is not row:
            raise TraceError(
                f"{root}: {other.file.path} and {row.file.path} would both be {row.name!r} of step {row.step} on rank "
                f"{row.rank}; say how the names are made: trimtab trace import {root} --out INDEX --pattern "
                "'step_{step}/rank{rank}/{name}'"
            )


def _check_counters(build: _Build) -> None:
    """Look for holes in the running numbers of each process: what its dumper could not write left no other mark."""
    for (phase, engine, _, rank), counter in build.counters.items():
        who = f"rank {rank} of {phase}" + (f", engine {engine}" if engine is not None else "")
        numbers = sorted(counter)
        holes = [(low, high) for low, high in itertools.pairwise(numbers) if high - low > 1]
        if holes:
            missing = sum(high - low - 1 for low, high in holes)
            build.problems.append(
                f"{who}: {missing} dumps have no file, first dump_index {holes[0][0] + 1}: the dumper skipped them (a "
                "name longer than a file's may be, save=False) or they were deleted"
            )
        twice = [number for number, count in counter.items() if count > 1]
        if twice:
            build.problems.append(
                f"{who}: {len(twice)} dump_index stand in several files, first {min(twice)}: several runs wrote here"
            )


def _plan(found: Found, build: _Build) -> dict[str, Any]:
    coordinates: dict[str, dict[str, int]] = {}
    sizes: dict[str, int] = {}
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for row in build.rows:
        coordinates.setdefault(str(row.rank), {}).update(
            {key.removesuffix("_rank"): index for key, index in row.tags.ranks.items()}
        )
        for axis, size in row.tags.sizes.items():
            sizes[axis] = max(size, sizes.get(axis, 1))
        by_step = counts.setdefault(row.phase, {}).setdefault(str(row.rank), {})
        by_step[str(row.step)] = by_step.get(str(row.step), 0) + 1
    return {
        "layout": found.layout,
        "files": len(found.files),
        "bytes": build.bytes,
        "coordinates": {rank: axes for rank, axes in coordinates.items() if axes},
        "sizes": sizes,
        "counts": counts,
        "unreadable": [{"file": file, "reason": why} for file, why in list(build.unreadable.items())[:_LISTED]],
        "skipped": build.skipped[:_LISTED],
        "ignored": [path.encode("utf-8", "backslashreplace").decode() for path in found.ignored[:_LISTED]],
        "notes": build.notes,
    }


def _frame(rows: list[Row]) -> pl.DataFrame:
    columns: dict[str, list[Any]] = {name: [] for name in RECORDS}
    orders: Counter[int] = Counter()
    for row in rows:
        values = row.columns()
        values["order"] = orders[row.rank]
        values["record_id"] = row.rank * RECORD_ID_BASE + orders[row.rank]
        orders[row.rank] += 1
        for name, column in columns.items():
            column.append(values.get(name))
    return pl.DataFrame(columns, schema=RECORDS)
