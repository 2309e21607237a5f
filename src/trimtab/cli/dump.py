"""`trimtab dump`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def dump(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    out: Annotated[Path, Parameter(alias="-o")],
    tag: str | None = None,
    level: Literal["values", "statistics", "digests"] | None = None,
    parts: str | None = None,
    sites: Annotated[str | None, Parameter(alias="-s")] = None,
    depth: int | None = None,
    classes: str | None = None,
    steps: str | None = None,
    phase: str | None = None,
    ring: int | None = None,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    expect: str | None = None,
    only: Path | None = None,
    prove: Annotated[bool, Parameter(negative="")] = False,
    output: Output = Output(),
) -> int:
    """Run a training or inference program and record it; the program is written behind -- and stays as it is.

    Args:
        command: the program and its arguments, such as -- python train.py --lr 3e-4.
        out: directory of the trace; it must not hold one.
        tag: which side of a comparison this is, baseline or target; baseline unless given.
        level: values, statistics or digests; values unless given.
        parts: what is recorded, of inputs outputs gradients loss params param_grads optimizer buffers rng lr.
        sites: patterns such as layers.*.resid_post or "module:encoder.*.output"; every module unless given.
        depth: modules at most so many levels below the model.
        classes: names of module classes, separated by commas.
        steps: steps to record, such as 0:10 or 0:1000:100.
        phase: name of the phase; told from grad mode and train mode unless given.
        ring: keep so many steps in memory, and write them when a NaN or Inf appears or an exception ends the run.
        max_bytes: most bytes of tensors that each process stores.
        max_seconds: most seconds that each process spends on recording.
        expect: names that each phase must hold, separated by commas, or sglang or megatron.
        only: JSON of a comparison; only the records that it did not find identical are kept.
        prove: run the program again without the hooks, and compare losses and outputs to the bit.
    """
    kwargs = given(
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
        only=only,
        prove=prove,
    )
    return run(Call(function="trimtab.dump.run", args=(list(command), out), kwargs=kwargs), output, show=str)
