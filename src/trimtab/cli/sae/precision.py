"""`trimtab sae precision`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Dtype
from trimtab.cli._options import given as present
from trimtab.sae.train.config import SAESettings, given


def precision(
    data: str = "testbed",
    /,
    *,
    site: Annotated[str | None, Parameter(alias="-s")] = None,
    batches: int = 4,
    batch_size: int = 4096,
    seed: int = 0,
    model: Annotated[str, Parameter(alias="-m")] = "testbed",
    backend: str = "hf",
    model_dtype: Dtype = "float32",
    device: str | None = None,
    context_size: int = 128,
    model_batch: int = 16,
    column: str = "text",
    html: Path | None = None,
    settings: SAESettings = SAESettings(),
    output: Output = Output(),
) -> int:
    """Measure what a precision would do to the tensors of a training, on its data, before it.

    The exit code is 1 when something overflows or a parameter would not learn.

    Args:
        data: what sae train would be given: texts, the directory of a trace, synthetic:FxD, or testbed.
        site: where the input is taken, such as layers.4.mlp_out; synthetic data need none.
        batches: batches to look at.
        batch_size: tokens of a batch.
        seed: of the first parameters and the order of the data.
        model: a directory, a hub id, or "testbed" for the embedded model.
        backend: who runs it: hf, mock or vllm.
        model_dtype: the model's dtype.
        device: cpu, cuda, cuda:1 or mps. Default: cuda when there is one, else cpu.
        context_size: tokens of a context of the model.
        model_batch: contexts that run together.
        column: of texts in files and data sets.
        html: also write the report there.
    """
    options: dict[str, Any] = {
        "batches": (batches, 4),
        "batch_size": (batch_size, 4096),
        "seed": (seed, 0),
        "model": (model, "testbed"),
        "backend": (backend, "hf"),
        "model_dtype": (model_dtype, "float32"),
        "context_size": (context_size, 128),
        "model_batch": (model_batch, 16),
        "column": (column, "text"),
    }
    kwargs = present(sites=site, device=device)
    kwargs |= {name: value for name, (value, default) in options.items() if value != default}
    kwargs |= given(settings)
    call = Call(function="trimtab.sae.check_precision", args=(data,), kwargs=kwargs)
    return run(call, output, html=html)
