"""`trimtab vectors train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Dtype, given
from trimtab.errors import InputError
from trimtab.vectors.train.config import TrainingConfig


def train(
    data: str | None = None,
    /,
    *,
    config: TrainingConfig,
    out: Path | None = None,
    all: Annotated[Path | None, Parameter(negative="")] = None,
    select: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    ray: str | None = None,
    workers: int | None = None,
    retry: Annotated[bool, Parameter(negative="")] = False,
    html: Path | None = None,
    model: Annotated[str, Parameter(alias="-m")] = "testbed",
    dtype: Dtype = "float32",
    device: str | None = None,
    device_map: str | None = None,
    allow_fallback: Annotated[bool, Parameter(negative="")] = False,
    output: Output = Output(),
) -> int:
    """Train steering vectors or low-rank maps at sites of a frozen model.

    Args:
        data: contrast data as for extract, such as rows.jsonl:score>=75 or testbed:ATTRIBUTE.
        config: the settings.
        out: directory of the result; an interrupted training goes on there, a finished one is read.
        all: train on every data set of this folder instead; out holds one directory per set.
        select: with --all: conditions on the rows of every set.
        dry_run: with --all: train nothing, time one step and estimate the rest.
        ray: with --all: a Ray cluster: auto, HOST:PORT, or local.
        workers: with --ray: how many.
        retry: with --all: train sets again that failed.
        html: also write the report there.
        model: a directory, a hub id, or "testbed" for the embedded model.
        dtype: the model's dtype; what is trained is float32.
        device: cpu, cuda, cuda:1 or mps. Default: cuda when there is one, else cpu.
        device_map: spread the model over several devices, such as auto.
        allow_fallback: train at sites that were found by structure.
    """
    if (data is None) == (all is None):
        raise InputError("give data, or --all with a folder of data sets" + " (not both)" * (data is not None))
    queue = given(select=select, dry_run=dry_run, ray=ray, workers=workers, retry=retry)
    kwargs = given(out=out, device=device, device_map=device_map, allow_fallback=allow_fallback)
    kwargs |= {"dtype": dtype} if dtype != "float32" else {}
    settings = config.given()
    if all is not None:
        call = Call(function="trimtab.train_all", args=(all, model), kwargs=kwargs | queue | settings)
        return run(call, output, html=html)
    if queue:
        raise InputError(f"--{next(iter(queue)).replace('_', '-')} belongs to --all FOLDER")
    call = Call(function="trimtab.vectors.train", args=(model, data), kwargs=kwargs | settings)
    return run(call, output, summarise=_result, html=html)


def _result(made: Any) -> Any:
    return made.result
