"""`trimtab weights attention`."""

from __future__ import annotations

from trimtab.cli._call import Output
from trimtab.cli.weights._shared import Reading, analyse


def attention(
    base: str,
    tuned: str,
    /,
    *,
    reading: Reading = Reading(),
    offset: int = 0,
    output: Output = Output(),
) -> int:
    """Compare who attends to whom, and what attention writes, head by head, before and after training.

    Args:
        base: directory, hub id, or "testbed".
        tuned: a model of the same architecture.
        offset: positions that the query stands after the key.
    """
    return analyse(
        "attention", "measure_attention", base, tuned, reading, output, **({"offset": offset} if offset else {})
    )
