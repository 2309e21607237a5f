"""`trimtab vectors show`."""

from __future__ import annotations

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def show(path: str, /, *, layer: int | None = None, key: str | None = None, output: Output = Output()) -> int:
    """Say what a vector file holds: site, norm, digest, how it was made.

    Args:
        path: any vector file.
        layer: layer to look at, in a file of several.
        key: entry to look at, in a file of several.
    """
    return run(Call(function="trimtab.vectors.show", args=(path,), kwargs=given(layer=layer, key=key)), output)
