"""`trimtab testbed`."""

from __future__ import annotations

from pathlib import Path

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def build(*, out: Path, seed: int = 0, steps: int | None = None, output: Output = Output()) -> int:
    """Retrain the embedded model from its seed.

    Args:
        out: directory of the new model; it must not exist.
        seed: seed of the weights and of the text.
        steps: training steps (default: as the shipped model).
    """
    kwargs = {"seed": seed} | given(steps=steps)
    return run(Call(function="trimtab.testbed_build", args=(out,), kwargs=kwargs), output)
