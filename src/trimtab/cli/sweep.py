"""`trimtab sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Engine, given, read_prompts, steering_input
from trimtab.workflows.config import Steer, SweepOptions


def sweep(
    spec: Path | None = None,
    *,
    prompt: Annotated[list[str] | None, Parameter(negative="", alias="-p")] = None,
    prompt_file: Path | None = None,
    steering: str | None = None,
    out: Path | None = None,
    run_id: str | None = None,
    resume: bool = True,
    quick: Annotated[bool, Parameter(negative="")] = False,
    options: SweepOptions = SweepOptions(),
    steer: Steer = Steer(),
    engine: Engine = Engine(),
    output: Output = Output(),
) -> int:
    """Run backends x precisions x prompts under one steering; one directory, resumable.

    Args:
        spec: a YAML file with any of the options below; options on the command line win.
        prompt: what the model continues; repeat for several.
        prompt_file: a file with one prompt a line.
        steering: a steering file, instead of --vector and its options.
        out: directory of all runs (default: runs).
        run_id: name of this run's directory (default: made from the time).
        resume: go on with a run of the same name where it stopped.
        quick: two prompts and 8 tokens.
    """
    settings = options.given()
    model = settings.pop("model", None)
    kwargs = given(spec=spec, steering=steering_input(steering, steer)) | settings
    kwargs |= given(out=out, run_id=run_id, quick=quick)
    if not resume:
        kwargs["resume"] = False
    prompts = read_prompts(tuple(prompt or ()), prompt_file)
    args = (model, prompts) if prompts else (model,) if model else ()
    return run(Call(function="trimtab.sweep", args=args, kwargs=kwargs | engine.kwargs()), output)
