"""`trimtab vectors sweep-lr`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Dtype, given
from trimtab.vectors.train.config import TrainingConfig


def sweep_lr(
    data: str,
    /,
    *,
    config: TrainingConfig,
    rates: Annotated[list[float] | None, Parameter(consume_multiple=True, negative="")] = None,
    out: Path | None = None,
    html: Path | None = None,
    model: Annotated[str, Parameter(alias="-m")] = "testbed",
    dtype: Dtype = "float32",
    device: str | None = None,
    device_map: str | None = None,
    allow_fallback: Annotated[bool, Parameter(negative="")] = False,
    output: Output = Output(),
) -> int:
    """Train with many learning rates, one after the other, and say which is best.

    Args:
        data: contrast data as for train.
        config: the settings.
        rates: learning rates (default: 0.001 0.003 0.01 0.03 0.1 0.3 1).
        out: directory; one training below it per rate, and the table. Finished ones are not repeated.
        html: also write the report there.
        model: a directory, a hub id, or "testbed" for the embedded model.
        dtype: the model's dtype; what is trained is float32.
        device: cpu, cuda, cuda:1 or mps. Default: cuda when there is one, else cpu.
        device_map: spread the model over several devices, such as auto.
        allow_fallback: train at sites that were found by structure.
    """
    kwargs = given(rates=rates, out=out, device=device, device_map=device_map, allow_fallback=allow_fallback)
    kwargs |= {"dtype": dtype} if dtype != "float32" else {}
    call = Call(function="trimtab.vectors.sweep_lr", args=(model, data), kwargs=kwargs | config.given())
    return run(call, output, html=html)
