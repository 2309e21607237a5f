"""`trimtab weights mlp`."""

from __future__ import annotations

from trimtab.cli._call import Output
from trimtab.cli.weights._shared import Reading, analyse


def mlp(base: str, tuned: str, /, *, reading: Reading = Reading(), output: Output = Output()) -> int:
    """Compare what every layer's MLP answers to each direction and to its opposite before and after training.

    Args:
        base: directory, hub id, or "testbed".
        tuned: a model of the same architecture.
    """
    return analyse("mlp", "measure_mlp", base, tuned, reading, output)
