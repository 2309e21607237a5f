"""`trimtab rerun`."""

from __future__ import annotations

from pathlib import Path

from trimtab.cli._call import Call, Output, listing, run
from trimtab.cli._options import given


def rerun(manifest: Path, /, *, out: Path | None = None, output: Output = Output()) -> int:
    """Repeat a run from its manifest.

    Args:
        manifest: manifest.json of a trace, sweep.json of a sweep, or the directory that holds it.
        out: directory of the new run (default: beside the old one, with -rerun at its name's end).
    """
    return run(Call(function="trimtab.rerun", args=(manifest,), kwargs=given(out=out)), output, summarise=listing)
