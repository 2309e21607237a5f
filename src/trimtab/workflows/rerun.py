"""Repeat a run from its manifest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab._base.files import atomic_write_bytes
from trimtab.errors import InputError
from trimtab.results import GenerationRun, SweepRun
from trimtab.trace import Trace
from trimtab.workflows import _sweep_files
from trimtab.workflows._arguments import checked
from trimtab.workflows.run import STEERING_FILE, capture, generate
from trimtab.workflows.sweep import resume_sweep

_FUNCTIONS: dict[str, Callable[..., Any]] = {"capture": capture, "generate": generate}


@checked
def rerun(manifest: str | Path, *, out: str | Path | None = None) -> SweepRun | Trace | GenerationRun:
    """Repeat a sweep, a capture or a generation; or finish an interrupted sweep.

    Args:
        manifest: sweep.json, manifest.json of a trace, or the directory that holds it.
        out: directory of the new run; None takes the old one's name with "-rerun" at its end. The directory of an
            interrupted sweep itself finishes that sweep.

    Returns:
        What the repeated call returns.

    Raises:
        InputError: no manifest there, or one of a run that a file cannot repeat (a model in memory, a dump).
        RecipeError: `out` holds another run.
    """
    place = Path(manifest)
    source = place.parent if place.is_file() else place
    if source.name in ("", ".."):
        source = source.resolve()
    target = Path(out) if out is not None else source.with_name(f"{source.name}-rerun")
    if (source / "sweep.json").is_file():
        return _repeat_sweep(source, target)
    if not (source / "manifest.json").is_file():
        raise InputError(f"{source} holds no run: it has neither sweep.json nor manifest.json")
    call = _read_call(source)
    return _FUNCTIONS[call.pop("function")](**call, out=target)  # type: ignore[no-any-return]


def _repeat_sweep(source: Path, target: Path) -> SweepRun:
    files = _sweep_files.load(source)
    if target.resolve() != source.resolve():
        record = {**files.provenance, "rerun_of": str(source)}
        again = _sweep_files.create(target, files.plan, record, resume=True)
        if files.steering_path.exists() and not again.steering_path.exists():
            atomic_write_bytes(again.steering_path, files.steering_path.read_bytes())
    return resume_sweep(target)


def _read_call(source: Path) -> dict[str, Any]:
    call = Trace.open(source).manifest["provenance"].get("call")
    if not isinstance(call, Mapping) or call.get("function") not in _FUNCTIONS:
        raise InputError(f"{source} cannot be repeated from its manifest: it does not say which call made it")
    known = set(inspect.signature(_FUNCTIONS[call["function"]]).parameters)
    unknown = sorted(set(call) - known - {"function"})
    if unknown:
        raise InputError(
            f"{source}/manifest.json: unknown argument {unknown[0]!r} of {call['function']}; update trimtab"
        )
    made = {key: value for key, value in call.items() if key != "out"}
    if made.get("steering") is not None:
        made["steering"] = source / STEERING_FILE
    return made
