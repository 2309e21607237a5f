"""Repeat a run from its manifest."""

from __future__ import annotations

from pathlib import Path

from trimtab.results import SweepRun
from trimtab.workflows import _sweep_files
from trimtab.workflows.sweep import resume_sweep


def rerun(manifest: str | Path, *, out: str | Path | None = None) -> SweepRun:
    """Repeat a sweep, or finish one.

    Args:
        manifest: sweep.json, or the directory that holds it.
        out: directory of the new run; None takes the old one's name with "-rerun" at its end. The old directory itself
            finishes an interrupted sweep there.

    Returns:
        The state of the new run.

    Raises:
        InputError: no manifest there.
        RecipeError: `out` holds another run.
    """
    place = Path(manifest)
    source = place.parent if place.is_file() else place
    files = _sweep_files.load(source)
    target = Path(out) if out is not None else source.with_name(f"{source.name}-rerun")
    if target.resolve() != source.resolve():
        again = _sweep_files.create(target, files.plan, {**files.provenance, "rerun_of": str(source)}, resume=True)
        if files.steering_path.exists() and not again.steering_path.exists():
            again.steering_path.write_bytes(files.steering_path.read_bytes())
    return resume_sweep(target)
