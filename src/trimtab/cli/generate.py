"""`trimtab generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, LineOutput, run
from trimtab.cli._options import BatchedModel, Decoding, Engine, given, read_prompts, steering_input
from trimtab.workflows.config import Steer


def generate(
    *prompts: str,
    prompt_file: Path | None = None,
    steering: str | None = None,
    allow_unfired: Annotated[bool, Parameter(negative="")] = False,
    logprobs: int = 0,
    out: Path | None = None,
    steer: Steer = Steer(),
    model: BatchedModel = BatchedModel(),
    decoding: Decoding = Decoding(),
    engine: Engine = Engine(),
    output: LineOutput = LineOutput(),
) -> int:
    """Run a model, steered or not, and print the text.

    Args:
        prompts: what the model continues.
        prompt_file: a file with one prompt a line.
        steering: a steering file, instead of --vector and its options.
        allow_unfired: an op that selects no row is reported instead of refused.
        logprobs: log-probabilities of so many most probable tokens are kept in the trace.
        out: directory for a trace of tokens and doses.
    """
    kwargs = given(steering=steering_input(steering, steer), allow_unfired=allow_unfired, out=out)
    if logprobs:
        kwargs["logprobs"] = logprobs
    kwargs |= decoding.kwargs() | model.kwargs() | engine.kwargs()
    call = Call(function="trimtab.generate", args=(model.model, read_prompts(prompts, prompt_file)), kwargs=kwargs)
    return run(call, output, stream="on_generated")
