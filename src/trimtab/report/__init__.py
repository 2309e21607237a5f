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
from trimtab.report import _kinds, _text_other
from trimtab.results import from_json, to_json

__all__ = ["render_html", "render_json", "render_text", "report"]


def report(result: Any, path: str | os.PathLike[str] | None = None) -> str | Path:
    """Render a result, and write it when a path is given.

    Args:
        result: a result, a run that holds one as `report`, the file of one in JSON, or a directory that holds one.
        path: file to write; its ending chooses the form: `.html` (an `Analysis`, `Comparison` or `Triage`), `.json` or
            `.txt`.
            Its directory must exist.

    Returns:
        The text form without a path; else the path that was written.

    Raises:
        InputError: another ending, no such file or directory, one that cannot be written, or a result that has no
            such form.
    """
    if isinstance(result, str | os.PathLike):
        result = _load(Path(result))
    held = getattr(result, "report", None)
    if _kinds.renderer(held, "html") is not None:  # a run that holds its report
        result = held
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
    _check(result)
    render = _kinds.renderer(result, "text") or _text_other.render
    return render(result, width=width, color=color)


def render_json(result: Any) -> str:
    """Render any result dataclass as its versioned JSON document; `trimtab.results.from_json` reads it back."""
    _check(result)
    return to_json(result) + "\n"


def render_html(result: Any) -> str:
    """Render one HTML file that works from disk, offline, in light and dark; under 3 MB."""
    render = _kinds.renderer(result, "html")
    if render is not None:
        return render(result)
    raise InputError(f"no page for {_kind(result)}: give an Analysis, a Comparison or a Triage, or use .txt or .json")


def _check(result: object) -> None:
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        raise InputError(f"no report for {_kind(result)}: give a result such as an Analysis or a Comparison")


def _kind(result: object) -> str:
    return f"the class {result.__name__}" if isinstance(result, type) else f"a {type(result).__name__}"


def _load(path: Path) -> Any:
    """Read a JSON document, or the only result in a directory."""
    if path.is_dir():
        path = _result_in(path)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise InputError(f"no such file: {str(path)!r}; give the JSON file of a result") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not text: {error.reason} at byte {error.start}") from error
    found = _kinds.kind_of(jsonio.loads(text, path))
    if found is not None:
        return from_json(found, text)
    raise InputError(
        f"{str(path)!r} holds no result with a report: expected the JSON of an Analysis or a Comparison, or of a Triage"
    )


def _result_in(directory: Path) -> Path:
    found = []
    for file in sorted(directory.glob("*.json")):
        try:
            known = _kinds.kind_of(jsonio.loads(file.read_bytes(), file))
        except (InputError, OSError):
            continue
        found += [file] if known is not None else []
    if len(found) == 1:
        return found[0]
    names = f" of {', '.join(one.name for one in found)}" if found else ""
    raise InputError(f"{str(directory)!r} is a directory: give the JSON file of a result{names}")
