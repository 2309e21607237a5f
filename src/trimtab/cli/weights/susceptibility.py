"""`trimtab weights susceptibility`."""

from __future__ import annotations

from trimtab.cli._call import Output
from trimtab.cli.weights._shared import Reading, analyse


def susceptibility(
    base: str,
    tuned: str,
    /,
    *,
    reading: Reading = Reading(),
    rank: int = 32,
    output: Output = Output(),
) -> int:
    """Compare what every weight matrix makes of each direction before and after training, and the matrices themselves.

    Args:
        base: directory, hub id, or "testbed".
        tuned: a model of the same architecture.
        rank: singular values of each matrix's change.
    """
    more = {"rank": rank} if rank != 32 else {}
    return analyse("susceptibility", "measure_susceptibility", base, tuned, reading, output, **more)
