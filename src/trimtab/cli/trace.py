"""`trimtab trace ls, show, verify, repair, prune, import, export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def ls(path: Path, /, *, output: Output = Output()) -> int:
    """List what a trace holds.

    Args:
        path: directory of the trace.
    """
    return run(Call(function="trimtab.trace.ls", args=(path,)), output)


def show(path: Path, record: int, /, *, output: Output = Output()) -> int:
    """Show one record.

    Args:
        path: directory of the trace.
        record: record id, as ls prints it.
    """
    return run(Call(function="trimtab.trace.show", args=(path, record)), output)


def verify(path: Path, /, *, output: Output = Output()) -> int:
    """Re-hash every tensor.

    Args:
        path: directory of the trace.
    """
    return run(Call(function="trimtab.trace.verify", args=(path,)), output)


def repair(path: Path, /, *, output: Output = Output()) -> int:
    """Rebuild the index of an interrupted trace from its shards.

    Args:
        path: directory of the trace.
    """
    return run(Call(function="trimtab.trace.repair", args=(path,)), output)


def prune(
    path: Path,
    /,
    *,
    sites: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    output: Output = Output(),
) -> int:
    """Delete stored values that are not needed; rows, digests and statistics stay.

    Args:
        path: directory of the trace.
        sites: keep these sites only.
        dry_run: say what would go, and delete nothing.
    """
    return run(Call(function="trimtab.trace.prune", args=(path,), kwargs=given(sites=sites, dry_run=dry_run)), output)


def import_(
    source: Path, /, *, out: Path, pattern: str | None = None, phase: str | None = None, output: Output = Output()
) -> int:
    """Index a dump of sglang, of Miles, or of plain files; its values stay where they are.

    Args:
        source: directory of the dump.
        out: new directory for the index.
        pattern: how paths are made, such as "step_{step}/rank{rank}/{name}".
        phase: phase of what lies in no folder that names one.
    """
    kwargs = given(pattern=pattern, phase=phase)
    return run(Call(function="trimtab.trace.import_dump", args=(source, out), kwargs=kwargs), output)


def export(
    path: Path, /, *, out: Path, layout: Literal["sglang", "npy", "safetensors"] = "sglang", output: Output = Output()
) -> int:
    """Write a trace as files that other tools read.

    Args:
        path: directory of the trace.
        out: new directory for the files.
        layout: sglang's dumper, or a tree of npy or safetensors files.
    """
    kwargs = given(layout=layout if layout != "sglang" else None)
    return run(Call(function="trimtab.trace.export_dump", args=(path, out), kwargs=kwargs), output)
