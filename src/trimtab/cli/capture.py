"""`trimtab capture`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, listing, run
from trimtab.cli._options import BatchedModel, Decoding, Engine, given, read_prompts, steering_input
from trimtab.workflows.config import Steer


def capture(
    *prompts: str,
    out: Path,
    sites: Annotated[str, Parameter(alias="-s")] = "layers.*.resid_post",
    positions: str = "all",
    edit: Literal["after", "before", "both"] = "after",
    along: Path | None = None,
    prompt_file: Path | None = None,
    steering: str | None = None,
    allow_unfired: Annotated[bool, Parameter(negative="")] = False,
    logprobs: int = 0,
    max_bytes: int | None = None,
    steer: Steer = Steer(),
    model: BatchedModel = BatchedModel(),
    decoding: Decoding = Decoding(),
    engine: Engine = Engine(),
    output: Output = Output(),
) -> int:
    """Run a model, steered or not, and write its hidden states to a trace.

    Args:
        prompts: what the model continues.
        out: directory of the trace; it must not exist.
        sites: patterns such as layers.*.resid_post or "layers.{0,4}.mlp_out logits".
        positions: rows to keep: all, prompt, generated, last_prompt, response, or ranges such as 3:7.
        edit: hidden states after steering, before it, or both.
        along: a trace whose tokens are fed instead of the model's own (teacher forcing).
        prompt_file: a file with one prompt a line.
        steering: a steering file, instead of --vector and its options.
        allow_unfired: an op that selects no row is reported instead of refused.
        logprobs: log-probabilities of so many most probable tokens are kept.
        max_bytes: refuse to write more than this.
    """
    kwargs = given(
        sites=sites,
        out=out,
        positions=positions if positions != "all" else None,
        edit=edit if edit != "after" else None,
        along=along,
        steering=steering_input(steering, steer),
        allow_unfired=allow_unfired,
        max_bytes=max_bytes,
    )
    if logprobs:
        kwargs["logprobs"] = logprobs
    kwargs |= decoding.kwargs() | model.kwargs() | engine.kwargs()
    call = Call(function="trimtab.capture", args=(model.model, read_prompts(prompts, prompt_file)), kwargs=kwargs)
    return run(call, output, summarise=listing)
