"""`export_dump`: a trace as files that other tools read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from trimtab.errors import InputError, TraceCorruptError, TraceExistsError, TraceWriteError
from trimtab.trace.reader import Trace

Layout = Literal["sglang", "npy", "safetensors"]
LAYOUTS: tuple[Layout, ...] = ("sglang", "npy", "safetensors")
_UNSAFE = re.compile(r"[^A-Za-z0-9._=,\[\]-]")
_RANKS = ("tp_rank", "pp_rank", "cp_rank", "ep_rank", "dp_rank")
_LONGEST = 120  # characters of a name in a file's name; the whole may have 255
_FOLDERS = {"inference": "engines/engine_0", "fwd_only": "fwd_only/rollout_0", "fwd_bwd": "fwd_bwd/rollout_0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """What was written, and what was not."""

    format_version: int = 1
    path: str
    source: str
    layout: str
    records: int
    bytes: int
    """Bytes of the values."""
    skipped: tuple[tuple[int, str], ...]
    """Records without values, or with some that the layout cannot hold, with the reason."""
    renamed: tuple[tuple[str, str], ...]
    """Names that cannot be part of a file's name, and what stands for them."""


def export_dump(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, layout: Layout = "sglang"
) -> ExportResult:
    """Write the records of a trace as files.

    "sglang" is the layout of its dumper 0.5 (`step=0___rank=0___dump_index=1___name=...`, `{"value", "meta"}`), in
    Miles' folders when the trace has several phases; "npy" and "safetensors" are trees
    `PHASE/step_N/rank_N/NAME`, read back with the pattern `{phase}/step_{step}/rank_{rank}/{name}`.

    Args:
        path: a trace, or a dump that `Trace.open` reads.
        out: new directory.
        layout: one of those.

    Raises:
        InputError: another layout, or phases that sglang's layout has no folder for.
        TraceError: no trace at `path`.
        TraceExistsError: `out` is not empty.
        TraceWriteError: a file cannot be written.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    root, trace = Path(out), Trace.open(path)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise TraceExistsError(f"{root} exists and is not empty; choose a new directory")
    phases = list(trace.index["phase"].unique(maintain_order=True))
    other = [phase for phase in phases if phase not in _FOLDERS]
    if layout == "sglang" and len(phases) > 1 and other:
        raise InputError(f"sglang's layout has no folder for phase {other[0]!r}; there are {', '.join(_FOLDERS)}")
    writer = _Writer(trace, root, layout, folders=len(phases) > 1)
    try:
        for row in trace.index.iter_rows(named=True):
            writer.write(row)
    except OSError as error:
        raise TraceWriteError(
            f"cannot write {root}: {error.strerror or error}; check the path and free space"
        ) from error
    return ExportResult(
        path=str(root),
        source=trace.path,
        layout=layout,
        records=writer.records,
        bytes=writer.bytes,
        skipped=tuple(writer.skipped),
        renamed=tuple(sorted(writer.renamed.items())),
    )


class _Writer:
    def __init__(self, trace: Trace, root: Path, layout: Layout, *, folders: bool) -> None:
        self._trace, self._root, self._layout, self._folders = trace, root, layout, folders
        self._taken: Counter[str] = Counter()
        self._orders: Counter[tuple[str, int]] = Counter()
        self.records = self.bytes = 0
        self.skipped: list[tuple[int, str]] = []
        self.renamed: dict[str, str] = {}

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one record, or note why not."""
        if row["shard"] is None:
            self.skipped.append((row["record_id"], "its values were not kept"))
            return
        try:
            tensor = self._trace.tensor(row["record_id"]).contiguous()
        except TraceCorruptError as error:
            self.skipped.append((row["record_id"], str(error)))
            return
        if self._layout == "sglang":
            self._sglang(row, tensor)
        elif self._layout == "npy" and tensor.dtype not in _NUMPY:
            self.skipped.append((row["record_id"], f"numpy has no {tensor.dtype}; use safetensors"))
            return
        else:
            self._plain(row, tensor)
        self.records += 1
        self.bytes += tensor.nbytes

    def _plain(self, row: Mapping[str, Any], tensor: torch.Tensor) -> None:
        parts = [self._safe(row["site"] or row["name"])]
        parts += [f"layer={row['layer']}"] * (row["layer"] is not None and row["site"] is None)
        parts += [f"kind={row['kind']}"] * (row["kind"] != "value")
        parts += [f"micro={row['micro_step']}"] * (row["micro_step"] > 0) + ["recompute"] * bool(row["recompute"])
        folder = self._root / self._safe(row["phase"]) / f"step_{row['step']}" / f"rank_{row['rank']}"
        stem = ",".join(parts)
        count = self._taken[f"{folder}/{stem}"]
        self._taken[f"{folder}/{stem}"] += 1
        path = folder / f"{stem}{f',call={count}' if count else ''}.{self._layout}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._layout == "npy":
            np.save(path, tensor.numpy(), allow_pickle=False)
        else:
            save_file({"value": tensor}, path)

    def _sglang(self, row: Mapping[str, Any], tensor: torch.Tensor) -> None:
        name = _sglang_name(row)
        place = (row["phase"], row["rank"])
        self._orders[place] += 1
        tags: dict[str, Any] = {
            "step": row["step"],
            "rank": row["rank"],
            "dump_index": self._orders[place],
            "name": name,
            "recompute_status": "recompute" if row["recompute"] else "disabled",
        }
        if row["layer"] is not None:
            tags["layer_id"] = row["layer"]
        if row["micro_step"]:
            tags["micro_step"] = row["micro_step"]
        ranks = {key: row[key] for key in _RANKS if row[key] is not None}
        meta = {**tags, "megatron_parallel_info": ranks, **({"dims": row["dims"]} if row["dims"] else {})}
        folder = self._root / _FOLDERS[row["phase"]] if self._folders else self._root
        stem = "___".join(f"{key}={self._safe(name) if key == 'name' else value}" for key, value in tags.items())
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{stem}.pt").open("wb") as stream:  # by path, torch would raise its own errors
            torch.save({"value": tensor.clone(), "meta": meta}, stream)

    def _safe(self, name: str) -> str:
        """Return a name that can be part of a file's name; those that cannot are kept in `renamed`."""
        found = _UNSAFE.sub("_", name).replace("___", "_")[:_LONGEST]
        while "___" in found:
            found = found.replace("___", "_")
        if found != name and not name.startswith("module:"):
            self.renamed[name] = found
        return found or "_"


_NUMPY = {
    getattr(torch, name)
    for name in (
        "float16",
        "float32",
        "float64",
        "bool",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "complex64",
        "complex128",
    )
} | {torch.int8, torch.int16, torch.int32, torch.int64}


def _sglang_name(row: Mapping[str, Any]) -> str:
    text: str = row["site"] or row["name"]
    if text.startswith("module:"):
        path, _, side = text.removeprefix("module:").rpartition(".")
        side = side.removeprefix("grad_").replace("input", "inputs.0")
        text = f"non_intrusive__{path}.{side}" if path else text
    prefix = {"grad": "grad__", "param": "param__"}.get(row["kind"], "")
    return f"{prefix}{text}"
