"""`trimtab report`."""

from __future__ import annotations

from pathlib import Path

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def report(path: Path, /, *, out: Path | None = None, output: Output = Output()) -> int:
    """Render a result again: text, JSON or one HTML file.

    Args:
        path: a result as JSON, a directory that holds one, or the directory of a sweep.
        out: FILE.html, FILE.json or FILE.txt; without it the text is printed.
    """
    source = Call(function="trimtab.analyze", args=(path,)) if (path / "sweep.json").is_file() else path
    call = Call(function="trimtab.report", args=(source,), kwargs=given(path=out))
    return run(call, output, show=str)
