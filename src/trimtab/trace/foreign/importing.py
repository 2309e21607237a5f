"""`import_dump`: the index of a foreign dump as a trace of ours; the values stay where they are."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab._base import jsonio
from trimtab.errors import InputError, TraceError, TraceExistsError
from trimtab.trace._format import CLOSED, FOLDERS, MANIFEST, part_name, rank_folder
from trimtab.trace._parts import encode_records
from trimtab.trace._store import LocalStore, Store, open_store
from trimtab.trace.foreign._open import Foreign, open_foreign


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportResult:
    """What was indexed, and what could not be."""

    format_version: int = 1
    path: str
    source: str
    layout: str
    files: int
    records: int
    ranks: tuple[int, ...]
    bytes: int
    """Bytes of the files that stay where they are."""
    unreadable: tuple[tuple[str, str], ...]
    """Files that cannot be read, or not safely, with the reason; each has a record, whose reading raises it."""
    skipped: tuple[tuple[str, str], ...]
    """Values that are no tensor, with the reason."""
    ignored: tuple[str, ...]
    """Files that are no part of the dump."""
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def import_dump(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    phase: str = "inference",
) -> ImportResult:
    """Index a dump that others wrote; `Trace.open(out)` then reads its values where they are.

    Args:
        source: directory of a dump of sglang, of Miles' tree of them, or of .pt, .npy or .safetensors files.
        out: new directory for the index.
        pattern: how the paths of plain files are made, such as "step_{step}/rank{rank}/{name}". Placeholders: name,
            phase, step, micro_step, rank, layer, call_index, tp_rank, pp_rank, cp_rank, ep_rank, dp_rank; `*` is
            anything in one folder. Without {name} tensors are called as they are inside the file.
        phase: phase of what lies in no folder that names one.

    Raises:
        InputError: a pattern that cannot be used, or fits no file.
        TraceError: nothing to import, or several dumps and nothing says how they belong together.
        TraceExistsError: `out` exists.
    """
    root = Path(source).absolute()
    store, target = LocalStore(root), open_store(out)
    if not phase:
        raise InputError("phase is empty; leave it out, or give a name such as fwd_bwd")
    if store.size(MANIFEST) is not None:
        raise TraceError(f"{root} is a trace of ours already; open it as it is")
    if target.names("."):
        raise TraceExistsError(f"{target.root} exists and is not empty; choose a new directory for the index")
    found = open_foreign(store, pattern=pattern, phase=phase)
    if found is None:
        raise TraceError(f"{root} holds no .pt, .npy or .safetensors file; give the directory of a dump")
    ranks = _write(target, root, found)
    plan = found.manifest["plan"]
    return ImportResult(
        path=target.root,
        source=str(root),
        layout=plan["layout"],
        files=plan["files"],
        records=found.records.height,
        ranks=ranks,
        bytes=plan["bytes"],
        unreadable=tuple((one["file"], one["reason"]) for one in plan["unreadable"]),
        skipped=tuple((one["name"], one["reason"]) for one in plan["skipped"]),
        ignored=tuple(plan["ignored"]),
        notes=tuple(plan["notes"]),
        problems=found.problems,
    )


def _write(store: Store, root: Path, found: Foreign) -> tuple[int, ...]:
    """Write one part per rank, and the manifest last: without it there is no trace."""
    frame = found.records
    parts = frame.partition_by("rank", maintain_order=True) if frame.height else [frame]
    ranks = []
    for part in parts:
        rank = int(part["rank"][0]) if part.height else 0
        ranks.append(rank)
        for folder in FOLDERS:
            store.make(f"{rank_folder(rank)}/{folder}")
        store.put(part_name(rank, "records", 0), [encode_records(part, shard=None, shard_bytes=None)])
        closed = {"parts": {"records": 1}, "records": part.height, "interrupted": None}
        store.put(f"{rank_folder(rank)}/{CLOSED}", [jsonio.dumps(closed).encode()])
    manifest: dict[str, Any] = {
        **found.manifest,
        "imported": {
            "root": str(root),
            "unreadable": [{"file": file, "reason": why} for file, why in found.values.unreadable.items()],
            "problems": list(found.problems),
        },
    }
    store.put(MANIFEST, [json.dumps(manifest, indent=1, ensure_ascii=False).encode()])
    return tuple(ranks)
