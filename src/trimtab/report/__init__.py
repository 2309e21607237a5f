"""Render results as text, JSON or one self-contained HTML file; needs neither torch nor a GPU.

Example:
    report(analysis, "report.html")   # or "report.json", "report.txt"
    print(report(analysis))           # the text form
"""

from __future__ import annotations

import os
from pathlib import Path

from trimtab._base.files import atomic_write_bytes
from trimtab.errors import InputError
from trimtab.results import Analysis, to_json
from trimtab.results.comparison import Comparison

__all__ = ["Reportable", "render_html", "render_json", "render_text", "report"]

Reportable = Analysis | Comparison


def report(result: Reportable, path: str | os.PathLike[str] | None = None) -> str | Path:
    """Render a result, and write it when a path is given.

    Args:
        result: an `Analysis` or a `Comparison`.
        path: file to write; its ending chooses the form: `.html`, `.json` or `.txt`. Its directory must exist.

    Returns:
        The text form without a path; else the path that was written.

    Raises:
        InputError: another ending, no such directory, or a result that has no report.
    """
    if path is None:
        return render_text(result)
    target = Path(path)
    form = target.suffix.lower()
    if form not in (".html", ".json", ".txt"):
        raise InputError(f"report path {str(target)!r} ends in {form or 'nothing'!r}: use .html, .json or .txt")
    if not target.parent.is_dir():
        raise InputError(f"report path {str(target)!r}: no directory {str(target.parent)!r}; create it first")
    if form == ".html":
        data = render_html(result).encode()
    elif form == ".json":
        # A lone surrogate has no UTF-8 form; as backslash and code it is still the same JSON string.
        data = render_json(result).encode("utf-8", "backslashreplace")
    else:
        data = render_text(result).encode()
    atomic_write_bytes(target, data)
    return target


def render_text(result: Reportable, *, width: int = 120, color: bool = False) -> str:
    """Render for a terminal.

    Args:
        result: an `Analysis` or a `Comparison`.
        width: columns to fill.
        color: whether to emit ANSI colours.
    """
    from trimtab.report import _text

    if isinstance(result, Analysis):
        return _text.render_analysis(result, width=width, color=color)
    return _text.render_comparison(_checked(result), width=width, color=color)


def render_json(result: Reportable) -> str:
    """Render as the result's versioned JSON document; `trimtab.results.from_json` reads it back."""
    return to_json(result if isinstance(result, Analysis) else _checked(result)) + "\n"


def render_html(result: Reportable) -> str:
    """Render one HTML file that works from disk, offline, in light and dark; under 3 MB."""
    from trimtab.report import _html

    if isinstance(result, Analysis):
        return _html.render_analysis(result)
    return _html.render_comparison(_checked(result))


def _checked(result: object) -> Comparison:
    if not isinstance(result, Comparison):
        raise InputError(f"no report for a {type(result).__name__}: give an Analysis or a Comparison")
    return result
