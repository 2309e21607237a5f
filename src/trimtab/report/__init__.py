"""Render results as text, JSON or one self-contained HTML file; needs neither torch nor a GPU.

Example:
    report(analysis, "report.html")   # or "report.json", "report.txt"
    print(report(analysis))           # the text form
    report("analysis.json", "report.html")
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from trimtab._base import jsonio
from trimtab._base.files import atomic_write_bytes
from trimtab.errors import InputError
from trimtab.results import Analysis, Comparison, from_json, to_json

__all__ = ["render_html", "render_json", "render_text", "report"]


def report(result: Any, path: str | os.PathLike[str] | None = None) -> str | Path:
    """Render a result, and write it when a path is given.

    Args:
        result: a result, or the file of an `Analysis` or `Comparison` in JSON.
        path: file to write; its ending chooses the form: `.html` (an `Analysis` or a `Comparison`), `.json` or `.txt`.
            Its directory must exist.

    Returns:
        The text form without a path; else the path that was written.

    Raises:
        InputError: another ending, no such file or directory, one that cannot be written, or a result that has no
            such form.
    """
    if isinstance(result, str | os.PathLike):
        result = _load(Path(result))
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
    try:
        atomic_write_bytes(target, data)
    except OSError as error:
        raise InputError(f"report path {str(target)!r} cannot be written: {error.strerror}; give another") from error
    return target


def render_text(result: Any, *, width: int = 120, color: bool = False) -> str:
    """Render for a terminal.

    Args:
        result: any result dataclass.
        width: columns to fill.
        color: whether to emit ANSI colours.

    Raises:
        InputError: not a result.
    """
    from trimtab.report import _text, _text_other

    if isinstance(result, Analysis):
        return _text.render_analysis(result, width=width, color=color)
    if isinstance(result, Comparison):
        return _text.render_comparison(result, width=width, color=color)
    _check(result)
    return _text_other.render(result, width=width, color=color)


def render_json(result: Any) -> str:
    """Render any result dataclass as its versioned JSON document; `trimtab.results.from_json` reads it back."""
    _check(result)
    return to_json(result) + "\n"


def render_html(result: Analysis | Comparison) -> str:
    """Render one HTML file that works from disk, offline, in light and dark; under 3 MB."""
    from trimtab.report import _html

    if isinstance(result, Analysis):
        return _html.render_analysis(result)
    if isinstance(result, Comparison):
        return _html.render_comparison(result)
    raise InputError(f"no page for {_kind(result)}: give an Analysis or a Comparison, or use .txt or .json")


def _check(result: object) -> None:
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        raise InputError(f"no report for {_kind(result)}: give a result such as an Analysis or a Comparison")


def _kind(result: object) -> str:
    return f"the class {result.__name__}" if isinstance(result, type) else f"a {type(result).__name__}"


def _load(path: Path) -> Analysis | Comparison:
    """Read a JSON document; an analysis says its kind, a comparison is known by its ledger of two sides."""
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a directory: give the JSON file of a result")
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise InputError(f"no such file: {str(path)!r}; give the JSON file of a result") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not text: {error.reason} at byte {error.start}") from error
    document = jsonio.loads(text, path)
    keys = set(document) if isinstance(document, dict) else set()
    if keys and document.get("kind") == "analysis":
        return from_json(Analysis, text)
    if {"ledger", "records", "verdict"} <= keys:
        return from_json(Comparison, text)
    raise InputError(f"{str(path)!r} holds no result with a report: expected the JSON of an Analysis or a Comparison")
