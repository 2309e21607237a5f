"""The plan of a dump in its manifest: what is alike in all processes when it is opened, the rest when they end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab._base.files import FileLock, atomic_write_text
from trimtab.dump.config import DumpConfig
from trimtab.errors import TraceExistsError, TraceLockedError
from trimtab.trace import TraceWriter

_MANIFEST, _LOCK = "manifest.json", ".dump.lock"
_NOTED = ".noted.json"  # entries of processes that came before the manifest
_PATIENCE = 60.0  # seconds; the lock is held for milliseconds
_GATHERED = ("phases", "not_hooked", "unstored", "coordinates", "counts", "stopped", "optimizer", "precision")


def open_writer(config: DumpConfig, rank: int, size: int) -> TraceWriter:
    """Open this process's part of the trace, whether or not others have opened, or already ended, theirs.

    Raises:
        TraceExistsError: the directory holds another run, or this rank of this one.
    """
    plan: dict[str, Any] = {
        "tag": config.tag,
        "level": config.level,
        "parts": list(config.parts),
        "sites": list(config.sites),
        "depth": config.depth,
        "classes": list(config.classes),
        "record_steps": config.steps,
        "expect": list(config.expect),
        "only": len(config.only),
        "ranks": list(range(size)),
    }
    plan |= {"phases": {}, "not_hooked": [], "unstored": {}, "coordinates": {}, "counts": {}, "stopped": {}}
    plan |= {"optimizer": {}, "precision": {}}
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        found = read_plan(folder)
        plan |= {key: found[key] for key in _GATHERED if key in found}
        plan["not_hooked"] = [*plan["not_hooked"], *_noted(folder)]
        (folder / _NOTED).unlink(missing_ok=True)
        return TraceWriter(folder, kind="dump", plan=plan, rank=rank, level=config.level)


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the plan in a manifest; empty when there is none."""
    try:
        return dict(json.loads((folder / _MANIFEST).read_text(encoding="utf-8")).get("plan") or {})
    except (OSError, ValueError):
        return {}


def refuse_taken(folder: Path) -> None:
    """Refuse a directory that holds a run, before a program is started to write there.

    Raises:
        TraceExistsError: it does.
    """
    if (folder / _MANIFEST).exists():
        raise TraceExistsError(f"{folder} already holds a run; choose another directory, or delete it")


def add(folder: Path, rank: int, report: Mapping[str, Any]) -> None:
    """Put what one process found into the manifest.

    Args:
        folder: directory of the trace.
        rank: the process.
        report: not_hooked, unstored, coordinates, counts, stopped, phases, optimizer, precision.
    """
    with _locked(folder):
        path = folder / _MANIFEST
        manifest = json.loads(path.read_text(encoding="utf-8"))
        plan = manifest["plan"]
        plan["not_hooked"] += [entry for entry in report["not_hooked"] if entry not in plan["not_hooked"]]
        plan["unstored"] |= report["unstored"]
        for name in ("phases", "optimizer", "precision"):
            plan[name] |= report[name]
        if report["coordinates"]:
            plan["coordinates"][str(rank)] = report["coordinates"]
        if report["stopped"]:
            plan["stopped"][str(rank)] = report["stopped"]
        for (phase, step), count in sorted(report["counts"].items()):
            plan["counts"].setdefault(phase, {}).setdefault(str(rank), {})[str(step)] = count
        atomic_write_text(path, json.dumps(manifest, indent=1, ensure_ascii=False))


def note(folder: Path, entry: Mapping[str, str]) -> None:
    """Put an entry among what is not hooked; where nothing is recorded yet, it waits for the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        path = folder / _MANIFEST
        found = path.exists()
        document = json.loads(path.read_text(encoding="utf-8")) if found else {"plan": {"not_hooked": _noted(folder)}}
        listed = document["plan"]["not_hooked"]
        if entry not in listed:
            listed.append(dict(entry))
            atomic_write_text(path if found else folder / _NOTED, json.dumps(document, indent=1, ensure_ascii=False))


def _noted(folder: Path) -> list[dict[str, str]]:
    """What waits for the manifest."""
    try:
        return list(json.loads((folder / _NOTED).read_text(encoding="utf-8"))["plan"]["not_hooked"])
    except OSError:
        return []


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / _LOCK)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            lock.acquire()
            break
        except TraceLockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    try:
        yield
    finally:
        lock.release()
