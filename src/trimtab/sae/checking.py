"""check_precision: what a precision would do to a training, on its own data, before the first step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trimtab.errors import InputError
from trimtab.results import PrecisionReport
from trimtab.sae.ranges import precision_report
from trimtab.sae.scaling import Scales
from trimtab.sae.train.opening import open_training


def check_precision(
    data: Any = "testbed",
    *,
    batches: int = 4,
    sites: str | Sequence[str] | None = None,
    target: str = "",
    model: Any = "testbed",
    backend: str = "hf",
    model_dtype: str = "float32",
    device: str | torch.device | None = None,
    engine: Mapping[str, Any] | None = None,
    context_size: int = 128,
    model_batch: int = 16,
    column: str = "text",
    **settings: Any,
) -> PrecisionReport:
    """Measure what a precision would do to the tensors of a training of one autoencoder, on its first batches.

    Args:
        data: what `train` would be given; so for all arguments but `batches`.
        batches: how many to look at.
        sites: pattern of the input.
        target: site that is reconstructed instead.
        model: what runs texts.
        backend: "hf", "mock" or "vllm".
        model_dtype: the model's dtype.
        device: where the model runs; the report is made on the CPU.
        engine: settings of the vLLM engine.
        context_size: tokens of a context of the model.
        model_batch: contexts that run together.
        column: of the texts.
        settings: those of `train`; `dtype`, `lower_dtype` and `adam_trick` are what is in question.

    Returns:
        The report; `passed` is False when something overflows, or a parameter would not learn.

    Raises:
        RecipeError: an unknown setting, or a pair of dtypes that is not valid.
        InputError: data that cannot be read, several autoencoders, or no batch.

    Example:
        >>> check_precision("synthetic:256x64", d_sae=512, dtype="fp16", adam_trick=True)  # doctest: +SKIP
    """
    if batches < 1:
        raise InputError(f"batches is {batches}; at least 1 was expected")
    opened = open_training(
        data,
        sites=sites,
        target=target,
        model=model,
        backend=backend,
        model_dtype=model_dtype,
        device=device,
        engine=engine,
        context_size=context_size,
        model_batch=model_batch,
        column=column,
        settings=settings,
    )
    with opened.stream as stream:
        if len(opened.plans) != 1:
            raise InputError(
                f"{len(opened.plans)} autoencoders were asked for; a report is of one site, width and seed"
            )
        plan = opened.plans[0]
        if plan.target:
            raise InputError("a report is of an autoencoder; leave the target away, and give the input's site")
        drawn = [batch[plan.site] for batch in itertools.islice(stream, batches)]
        norm = stream.measured[plan.site].norm
    scales = Scales(norm=norm)
    if plan.adam_trick:
        scales = Scales.choose(plan.config, {"batch_size": len(drawn[0]), "norm": norm}, plan.precision)
    return precision_report(plan.config, drawn, precision=plan.precision, scales=scales, optim=plan.optim)
