"""`trimtab vectors random`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def random(
    like: str,
    /,
    *,
    out: Path,
    seed: int = 0,
    orthogonal: Annotated[bool, Parameter(negative="")] = False,
    permuted: Annotated[bool, Parameter(negative="")] = False,
    output: Output = Output(),
) -> int:
    """Write a control of a vector: another direction of the same norm.

    Args:
        like: the vector to match.
        out: file to write: .safetensors, .npy or .pt.
        seed: names the control for good.
        orthogonal: without any component along the vector.
        permuted: the vector's own elements in another order.
    """
    kwargs = {"out": out, **given(seed=seed or None, orthogonal=orthogonal, permuted=permuted)}
    return run(Call(function="trimtab.vectors.random", args=(like,), kwargs=kwargs), output)
