"""`trimtab sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Engine, given, read_prompts, steering_input
from trimtab.workflows.config import Steer


def sweep(
    spec: Path | None = None,
    *,
    prompt: Annotated[list[str] | None, Parameter(negative="", alias="-p")] = None,
    prompt_file: Path | None = None,
    model: Annotated[str | None, Parameter(alias="-m")] = None,
    steering: str | None = None,
    config: Annotated[list[str] | None, Parameter(negative="", alias="-c")] = None,
    reference: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    max_tokens: int | None = None,
    logprobs: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    allow_unfired: Annotated[bool, Parameter(negative="")] = False,
    out: Path | None = None,
    run_id: str | None = None,
    resume: bool = True,
    quick: Annotated[bool, Parameter(negative="")] = False,
    steer: Steer = Steer(),
    engine: Engine = Engine(),
    output: Output = Output(),
) -> int:
    """Run backends x precisions x prompts under one steering; one directory, resumable.

    Args:
        spec: a YAML file with any of the options below; options on the command line win.
        prompt: what the model continues; repeat for several.
        prompt_file: a file with one prompt a line.
        model: a directory, a hub id, or "testbed" for the embedded model.
        steering: a steering file, instead of --vector and its options.
        config: bf16, bf16_cap_fp32, float16, float32, float64, or [LABEL=]BACKEND:DTYPE[:OP_MATH]; repeat for several.
        reference: label of the configuration that the others are compared with (default: float32).
        backend: backend of the named configurations: hf, vllm, or "hf,vllm" for both.
        device: cpu, cuda, cuda:1 or mps.
        max_tokens: tokens to generate for each prompt (default: 32).
        logprobs: how many most probable tokens are kept at each step (default: 5).
        seed: seed of everything random.
        batch_size: prompts per batch (default: 8).
        allow_unfired: an op that selects no row is reported instead of refused.
        out: directory of all runs (default: runs).
        run_id: name of this run's directory (default: made from the time).
        resume: go on with a run of the same name where it stopped.
        quick: two prompts and 8 tokens.
    """
    kwargs = given(
        spec=spec,
        steering=steering_input(steering, steer),
        configs=tuple(config or ()),
        reference=reference,
        backend=backend,
        device=device,
        max_tokens=max_tokens,
        logprobs=logprobs,
        seed=seed,
        batch_size=batch_size,
        allow_unfired=allow_unfired,
        out=out,
        run_id=run_id,
        quick=quick,
    )
    if not resume:
        kwargs["resume"] = False
    prompts = read_prompts(tuple(prompt or ()), prompt_file)
    args = (model, prompts) if prompts else (model,) if model else ()
    return run(Call(function="trimtab.sweep", args=args, kwargs=kwargs | engine.kwargs()), output)
