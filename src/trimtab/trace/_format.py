"""Version 1 of the trace format: file names, columns and the manifest.

    run/manifest.json                               what the run is; written first, never changed
    run/rank-00000/writer.lock                      held by the one process that writes here
    run/rank-00000/records/part-00000.parquet       one row per record; committed after its shard
    run/rank-00000/tensors/part-00000.safetensors   the shard; its metadata repeats the identity columns
    run/rank-00000/tokens/part-00000.parquet        generated and prompt tokens
    run/rank-00000/dose/part-00000.parquet          what every op did to every row it touched
    run/rank-00000/closed.json                      written last: how many parts and records there must be

Versions: 1, the first.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import polars as pl

from trimtab._base import jsonio
from trimtab.errors import InputError, TraceCorruptError, TraceError, TraceVersionError
from trimtab.trace._store import Store

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LOCK = "writer.lock"
CLOSED = "closed.json"
FOLDERS = ("records", "tensors", "tokens", "dose")
RECORD_ID_BASE = 1 << 40  # record ids of rank r begin at r * 2**40, so that merged ranks never collide

Level = Literal["digests", "statistics", "values"]
LEVELS: tuple[Level, ...] = ("digests", "statistics", "values")
KINDS = ("value", "grad", "param", "optim")
EDITS = ("none", "before", "after")

# Columns that the caller's thread fills, then those that the writer's thread adds.
IDENTITY: dict[str, Any] = {
    "record_id": pl.Int64(),
    "order": pl.Int64(),
    "phase": pl.String(),
    "step": pl.Int64(),
    "micro_step": pl.Int64(),
    "rank": pl.Int64(),
    "tp_rank": pl.Int64(),
    "pp_rank": pl.Int64(),
    "cp_rank": pl.Int64(),
    "ep_rank": pl.Int64(),
    "dp_rank": pl.Int64(),
    "site": pl.String(),
    "layer": pl.Int64(),
    "name": pl.String(),
    "call_index": pl.Int64(),
    "edit": pl.String(),
    "config": pl.String(),
    "prompt": pl.Int64(),
    "request": pl.String(),
    "positions": pl.List(pl.Int64()),
    "dims": pl.String(),
    "dtype": pl.String(),
    "shape": pl.List(pl.Int64()),
    "kind": pl.String(),
    "source_file": pl.String(),
    "source_line": pl.Int64(),
    "module_path": pl.String(),
    "module_class": pl.String(),
    "recompute": pl.Boolean(),
}
MEASURED: dict[str, Any] = {
    "digest": pl.String(),
    "mean": pl.Float64(),
    "std": pl.Float64(),
    "absmax": pl.Float64(),
    "nan_count": pl.Int64(),
    "inf_count": pl.Int64(),
}
PLACE: dict[str, Any] = {"shard": pl.String(), "key": pl.String()}
RECORDS = pl.Schema({**IDENTITY, **MEASURED, **PLACE})
TOKENS = pl.Schema(
    {
        "config": pl.String(),
        "prompt": pl.Int64(),
        "request": pl.String(),
        "position": pl.Int64(),
        "token_id": pl.Int64(),
        "text": pl.String(),
        "logprob": pl.Float64(),
        "top_ids": pl.List(pl.Int64()),
        "top_logprobs": pl.List(pl.Float64()),
        "generated": pl.Boolean(),
        "stage": pl.String(),
    }
)
DOSE = pl.Schema(
    {
        "config": pl.String(),
        "prompt": pl.Int64(),
        "request": pl.String(),
        "site": pl.String(),
        "op": pl.String(),
        "position": pl.Int64(),
        "p_before": pl.Float64(),
        "p_after": pl.Float64(),
        "cap_delta": pl.Float64(),
        "clamped": pl.Boolean(),
        "ratio": pl.Float64(),
    }
)
TABLES: dict[str, pl.Schema] = {"records": RECORDS, "tokens": TOKENS, "dose": DOSE}

_RANK = re.compile(r"rank-(\d{5,})")
_PART = re.compile(r"part-(\d{5,})(?:\.\d+)?\.(?:parquet|safetensors)")


def rank_folder(rank: int) -> str:
    """Return the folder of one process's sub-trace."""
    return f"rank-{rank:05d}"


def rank_of(folder: str) -> int | None:
    """Return the rank of a sub-trace's folder name, or None for any other name."""
    match = _RANK.fullmatch(folder)
    return None if match is None else int(match[1])


def part_number(name: str) -> int | None:
    """Return the number of a part or shard from its file name (without folder), or None for any other name."""
    match = _PART.fullmatch(name)
    return None if match is None else int(match[1])


def part_name(rank: int, folder: str, number: int) -> str:
    """Return the name of a part relative to the run."""
    suffix = "safetensors" if folder == "tensors" else "parquet"
    return f"{rank_folder(rank)}/{folder}/part-{number:05d}.{suffix}"


def make_manifest(
    kind: str, level: Level, plan: Mapping[str, Any] | None, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a manifest as it will read back from disk.

    Raises:
        InputError: the plan or the provenance holds what JSON cannot.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "level": level,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "plan": plan,
        "provenance": provenance,
    }
    try:
        made: dict[str, Any] = json.loads(jsonio.dumps(manifest))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"plan and provenance go into {MANIFEST} and must be plain JSON (dict, list, str, numbers): {error}"
        ) from error
    return made


def read_manifest(store: Store) -> dict[str, Any]:
    """Read and check `manifest.json`.

    Raises:
        TraceError: there is none.
        TraceCorruptError: it cannot be read.
        TraceVersionError: a newer version wrote it.
    """
    if store.size(MANIFEST) is None:
        if Path(store.root).is_file():
            raise TraceError(f"no trace at {store.root}: it is a file; give the directory of a run")
        found = ", ".join(sorted(store.names("."))[:8])
        raise TraceError(
            f"no trace at {store.root}: it has no {MANIFEST}; "
            + (f"there is: {found}" if found else "nothing is there; give the directory of a run")
        )
    try:
        manifest = json.loads(store.read(MANIFEST))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise TraceCorruptError(
            f"{store.root}/{MANIFEST} cannot be read ({error}); restore it from a copy, or write the run again"
        ) from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise TraceVersionError(
            f"{store.root} has trace format version {version}; this trimtab reads versions up to {FORMAT_VERSION}: "
            "upgrade trimtab"
        )
    missing = [key for key in ("kind", "level", "created", "provenance") if key not in manifest]
    if missing:
        raise TraceCorruptError(
            f"{store.root}/{MANIFEST} is damaged: it has no {missing[0]!r}; restore it from a copy, or write the run "
            "again"
        )
    return dict(manifest)


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return the closest of `names`, for error messages."""
    listed = list(names)
    near = difflib.get_close_matches(str(name), listed, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
