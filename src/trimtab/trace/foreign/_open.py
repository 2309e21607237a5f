"""Opening a foreign dump in place, and the values of one that was imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from trimtab.errors import TraceCorruptError
from trimtab.trace._format import make_manifest
from trimtab.trace._store import Store
from trimtab.trace.foreign._index import build_index
from trimtab.trace.foreign._layout import detect
from trimtab.trace.foreign._values import ForeignValues


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """A foreign dump, read as a run."""

    manifest: dict[str, Any]
    records: pl.DataFrame
    values: ForeignValues
    problems: tuple[str, ...]


def open_foreign(store: Store, *, pattern: str | None = None, phase: str = "inference") -> Foreign | None:
    """Read the index of a directory that no writer of ours made; None when it holds nothing that could be read.

    Args:
        store: the directory.
        pattern: how paths are made, of plain files; None finds the layout out.
        phase: phase of what lies in no folder that names one.

    Raises:
        TraceError: several dumps, or files that no rule tells apart.
        InputError: a pattern that cannot be used.
    """
    if not store.local:
        return None
    found = detect(store.root, pattern)
    if found is None:
        return None
    index = build_index(store.root, found, phase)
    manifest = make_manifest("dump", "values", index.plan, {"source": store.root, "layout": found.layout})
    values = ForeignValues(store.root, index.unreadable)
    return Foreign(manifest=manifest, records=index.frame, values=values, problems=tuple(index.problems))


def values_of(manifest: Mapping[str, Any], root: str) -> ForeignValues | None:
    """Return where the values of an imported dump are; None for a trace that holds its own.

    Raises:
        TraceCorruptError: the manifest of an import is damaged.
    """
    imported = manifest.get("imported")
    if imported is None:
        return None
    try:
        unreadable = {str(one["file"]): str(one["reason"]) for one in imported["unreadable"]}
        return ForeignValues(str(imported["root"]), unreadable)
    except (KeyError, TypeError) as error:
        raise TraceCorruptError(f"{root}/manifest.json: 'imported' is damaged; import the dump again") from error
