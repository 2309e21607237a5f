"""`trimtab triage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given, noise_runs


def triage(
    reference: Path,
    candidate: Path,
    /,
    *,
    revisions: str | None = None,
    repo: Path | None = None,
    source_map: Path | None = None,
    transplant: str | None = None,
    verdict: str = "calibrated",
    rule: Annotated[list[str] | None, Parameter(negative="")] = None,
    noise: Annotated[list[Path] | None, Parameter(negative="", consume_multiple=True)] = None,
    waive: Annotated[list[str] | None, Parameter(negative="")] = None,
    expect: Path | None = None,
    config: str | None = None,
    reference_config: str | None = None,
    dims: Annotated[list[str] | None, Parameter(negative="")] = None,
    reference_dims: Annotated[list[str] | None, Parameter(negative="")] = None,
    jobs: Annotated[int, Parameter(alias="-j")] = 1,
    html: Path | None = None,
    output: Output = Output(),
) -> int:
    """Find the module that made the first error, its source line, what changed there, and a patch.

    Args:
        reference: the trace that is trusted.
        candidate: the trace under test.
        revisions: BASE..HEAD whose difference explains the change; default: the commits that the traces name.
        repo: a folder of the repository; default: that of the suspect's file.
        source_map: a YAML list of {phase, tensor, file}: where the tensors of imported dumps are made.
        transplant: MODULE:FUNCTION that returns (model, function that runs it once): replaces the suspect's tensor by
            the reference's and shows whether what follows agrees.
        verdict: calibrated, or the name of a published scale.
        rule: "REGEX: PREDICATE", first match wins; repeat for several.
        noise: a run of the reference repeated with another batch composition, or two such runs; their difference
            replaces the rounding model.
        waive: a name that may be missing, skipped or inconclusive; repeat for several.
        expect: a file that lists what must be there.
        config: this configuration of the candidate.
        reference_config: this configuration of the reference.
        dims: "REGEX: DIMS", such as ".*qkv.*: b s h[tp]", in place of the dims that were recorded; repeat for several.
        reference_dims: the same for the reference only.
        jobs: processes that compare; the result does not depend on their number.
        html: also write the report there.
    """
    kwargs = given(
        revisions=revisions,
        repo=repo,
        source_map=source_map,
        transplant=transplant,
        verdict=verdict if verdict != "calibrated" else None,
        rules=tuple(rule or ()),
        noise=noise_runs(noise),
        waive=tuple(waive or ()),
        expect=expect,
        config=config,
        reference_config=reference_config,
        dims=tuple(dims or ()),
        reference_dims=tuple(reference_dims or ()),
        jobs=jobs if jobs != 1 else None,
    )
    call = Call(function="trimtab.triage", args=(reference, candidate), kwargs=kwargs)
    return run(call, output, html=html)
