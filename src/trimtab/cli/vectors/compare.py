"""`trimtab vectors compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def compare(
    vectors: Annotated[list[str], Parameter(negative="")],
    /,
    *,
    against: Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=True)] = (),
    out: Path | None = None,
    html: Path | None = None,
    output: Output = Output(),
) -> int:
    """Compare steering vectors: cosines, norms, validation losses, trained against extracted.

    Args:
        vectors: vector files, or folders of them.
        against: a second set, such as the extracted vectors of what was trained; vectors of one name are matched.
        out: directory for pairs.parquet and comparison.json.
        html: also write the page.
    """
    call = Call(function="trimtab.vectors.compare", args=(vectors,), kwargs=given(against=against, out=out))
    return run(call, output, html=html)
