"""`trimtab compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, LineOutput, run
from trimtab.cli._options import given, noise_runs
from trimtab.errors import InputError


def compare(
    reference: Path,
    candidate: Path,
    /,
    *,
    verdict: str = "calibrated",
    rule: Annotated[list[str] | None, Parameter(negative="")] = None,
    noise: Annotated[list[Path] | None, Parameter(negative="", consume_multiple=True)] = None,
    waive: Annotated[list[str] | None, Parameter(negative="")] = None,
    expect: Path | None = None,
    verify: Annotated[bool, Parameter(negative="")] = False,
    config: str | None = None,
    reference_config: str | None = None,
    dims: Annotated[list[str] | None, Parameter(negative="")] = None,
    reference_dims: Annotated[list[str] | None, Parameter(negative="")] = None,
    worst: int = 3,
    tolerances: Annotated[bool, Parameter(negative="")] = False,
    jobs: Annotated[int, Parameter(alias="-j")] = 1,
    ray: str | None = None,
    html: Annotated[Path | None, Parameter(alias="--report")] = None,
    output: LineOutput = LineOutput(),
) -> int:
    """Compare two traces tensor by tensor, with a calibrated verdict.

    Args:
        reference: the trace that is trusted.
        candidate: the trace under test.
        verdict: calibrated, or the name of a published scale.
        rule: "REGEX: PREDICATE", first match wins; repeat for several.
        noise: a run of the reference repeated with another batch composition, or two such runs; their difference
            replaces the rounding model.
        waive: a name that may be missing, skipped or inconclusive; repeat for several.
        expect: a file that lists what must be there.
        verify: re-hash every tensor first.
        config: this configuration of the candidate.
        reference_config: this configuration of the reference.
        dims: "REGEX: DIMS", such as ".*qkv.*: b s h[tp]", in place of the dims that were recorded; repeat for several.
        reference_dims: the same for the reference only.
        worst: how many of the worst elements and rows of a pair that does not pass are listed.
        tolerances: measure the tolerance that each pair would need, of pairs that pass as well.
        jobs: processes that compare; the result does not depend on their number.
        ray: compare on this Ray cluster: "auto", HOST:PORT or "local"; the traces lie on storage that it shares.
        html: also write the report there.
    """
    kwargs = given(
        verdict=verdict if verdict != "calibrated" else None,
        rules=tuple(rule or ()),
        noise=noise_runs(noise),
        waive=tuple(waive or ()),
        expect=expect,
        verify=verify,
        config=config,
        reference_config=reference_config,
        dims=tuple(dims or ()),
        reference_dims=tuple(reference_dims or ()),
        worst=worst if worst != 3 else None,
        tolerances=tolerances,
        jobs=jobs if jobs != 1 else None,
    )
    if ray is not None:
        if jobs != 1 or output.jsonl:
            raise InputError("--ray takes neither --jobs nor --jsonl: the cluster has its own number of processes")
        kwargs["address"] = ray
        return run(
            Call(function="trimtab.compare_on_ray", args=(reference, candidate), kwargs=kwargs), output, html=html
        )
    call = Call(function="trimtab.compare", args=(reference, candidate), kwargs=kwargs)
    return run(call, output, html=html, stream="on_compared")
