"""`trimtab debug-decode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Dtype, Engine, Model, given, steering_input
from trimtab.workflows.config import Steer


@Parameter(name="*", group="Model")
@dataclass(frozen=True, kw_only=True, slots=True)
class TestedModel(Model):
    """The model on the side under test."""

    dtype: Dtype = "bfloat16"
    """The model's dtype on the side under test."""


def debug_decode(
    *,
    prompt: Annotated[str, Parameter(alias="-p")],
    steering: str | None = None,
    compare_precision: Literal["float32", "bfloat16", "float16"] | None = None,
    compare_dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None,
    max_tokens: int = 32,
    logprobs: int = 5,
    steer: Steer = Steer(),
    model: TestedModel = TestedModel(),
    engine: Engine = Engine(),
    output: Output = Output(),
) -> int:
    """Compare two precisions on one prompt, step by step.

    Args:
        prompt: what the model continues.
        steering: a steering file, instead of --vector and its options.
        compare_precision: the other side does the op's arithmetic in this dtype.
        compare_dtype: the other side runs the model in this dtype.
        max_tokens: decode steps.
        logprobs: how many most probable tokens are compared at each step.
    """
    kwargs = {"steering": steering_input(steering, steer)}
    kwargs |= given(compare_precision=compare_precision, compare_dtype=compare_dtype)
    kwargs |= {"max_tokens": max_tokens, "logprobs": logprobs, "dtype": model.dtype} | model.kwargs() | engine.kwargs()
    return run(Call(function="trimtab.debug_decode", args=(model.model, prompt), kwargs=kwargs), output)
