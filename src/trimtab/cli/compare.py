"""`trimtab compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def compare(
    reference: Path,
    candidate: Path,
    /,
    *,
    verdict: str = "calibrated",
    rule: Annotated[list[str] | None, Parameter(negative="")] = None,
    noise: Path | None = None,
    waive: Annotated[list[str] | None, Parameter(negative="")] = None,
    expect: Path | None = None,
    verify: Annotated[bool, Parameter(negative="")] = False,
    config: str | None = None,
    reference_config: str | None = None,
    html: Path | None = None,
    output: Output = Output(),
) -> int:
    """Compare two traces tensor by tensor, with a calibrated verdict.

    Args:
        reference: the trace that is trusted.
        candidate: the trace under test.
        verdict: calibrated, or the name of a published scale.
        rule: "REGEX: PREDICATE", first match wins; repeat for several.
        noise: a trace of the reference run repeated with another batch composition; replaces the rounding model.
        waive: a name that may be missing, skipped or inconclusive; repeat for several.
        expect: a file that lists what must be there.
        verify: re-hash every tensor first.
        config: this configuration of the candidate.
        reference_config: this configuration of the reference.
        html: also write the report there.
    """
    kwargs = given(
        verdict=verdict if verdict != "calibrated" else None,
        rules=tuple(rule or ()),
        noise=noise,
        waive=tuple(waive or ()),
        expect=expect,
        verify=verify,
        config=config,
        reference_config=reference_config,
    )
    call = Call(function="trimtab.compare", args=(reference, candidate), kwargs=kwargs)
    return run(call, output, html=html)
