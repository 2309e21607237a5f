"""`trimtab demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def demo(
    *,
    out: Path = Path("runs/demo"),
    quick: Annotated[bool, Parameter(negative="")] = False,
    output: Output = Output(),
) -> int:
    """Sweep capped steering over precisions on the embedded model, and write the report.

    Args:
        out: directory of the run; a finished or interrupted one is used again.
        quick: two prompts and 8 tokens.
    """
    return run(Call(function="trimtab.demo", args=(out,), kwargs=given(quick=quick)), output, html=out / "report.html")
