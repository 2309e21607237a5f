"""Record a training or inference run of any `nn.Module` into a trace.

    with trimtab.dump.record("runs/a", level="statistics") as session:
        session.watch(model, optimizer)
        for batch in batches:
            ...
            session.step()

`docs/dump.md` shows the ways to turn it on, and what the records are called.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from trimtab.dump.callback import DumpCallback
from trimtab.dump.command import DumpCount, DumpRun, ObserverProof, run
from trimtab.dump.config import EXPECTED, PARTS, DumpConfig
from trimtab.dump.only import diverged
from trimtab.dump.session import Dump, active, dump
from trimtab.results import Comparison
from trimtab.results.comparison import RecordKey
from trimtab.trace import Level

__all__ = [
    "EXPECTED",
    "PARTS",
    "Dump",
    "DumpCallback",
    "DumpConfig",
    "DumpCount",
    "DumpRun",
    "ObserverProof",
    "active",
    "diverged",
    "dump",
    "record",
    "run",
]


def record(
    out: str | os.PathLike[str],
    *,
    tag: str = "baseline",
    level: Level = "values",
    parts: str | Iterable[str] | None = None,
    sites: str | Iterable[str] | None = None,
    depth: int | None = None,
    classes: str | Iterable[str] | None = None,
    steps: str | int | range | Iterable[int] | None = None,
    phase: str = "",
    ring: int = 0,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    expect: str | Iterable[str] | None = None,
    only: Comparison | Iterable[RecordKey | str] | None = None,
    coordinates: Mapping[str, int] | Any = None,
) -> Dump:
    """Describe a dump; it is on inside its `with` block.

    Args:
        out: directory of the trace; every process of the run gives the same.
        tag: which side of a comparison this is.
        level: "values" keeps tensors, statistics and digests; "statistics" and "digests" keep no values.
        parts: what is recorded, of `PARTS`; None: everything.
        sites: site patterns, such as "layers.*.mlp_out" or "module:encoder.*.output"; None: every module.
        depth: modules at most so many levels below the model.
        classes: names of module classes.
        steps: steps to record: 3, range(0, 100, 10), "0:100:10,500".
        phase: name of the phase; "" tells it from grad mode and train mode.
        ring: keep so many steps in memory, and write them when a NaN or Inf appears or an exception ends the run.
        max_bytes: most bytes of tensors that each process stores.
        max_seconds: most seconds that each process spends on recording.
        expect: names that each phase must hold, or a key of `EXPECTED`.
        only: what a comparison of two digests found to differ; nothing else is kept.
        coordinates: this process's place in the parallel layout: a DeviceMesh, or a mapping such as `{"tp": 1}`.

    Raises:
        InputError: a value that makes no sense.

    Example:
        >>> with record("runs/a", steps="0:3") as session:  # doctest: +SKIP
        ...     session.watch(model, optimizer)
    """
    config = DumpConfig.make(
        out,
        tag=tag,
        level=level,
        parts=parts,
        sites=sites,
        depth=depth,
        classes=classes,
        steps=steps,
        phase=phase,
        ring=ring,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        expect=expect,
        only=None if only is None else diverged(only),
    )
    return Dump(config, coordinates=coordinates)
