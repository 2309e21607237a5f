"""JSON as this project writes it: sorted never, non-finite numbers as "inf", "-inf" and "nan"."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from trimtab.errors import InputError

_TO_TEXT = {math.inf: "inf", -math.inf: "-inf"}


def plain(value: Any) -> Any:
    """Return `value` with tuples as lists and non-finite floats as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return _TO_TEXT.get(value, "nan")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Serialise plain containers; raises `TypeError` for anything else."""
    separators = (",", ":") if indent is None else None
    return json.dumps(plain(value), indent=indent, separators=separators, allow_nan=False, ensure_ascii=False)


def loads(text: str | bytes, source: str | os.PathLike[str] = "") -> Any:
    """Parse JSON; the strings "inf", "-inf" and "nan" are left to the schema (pydantic reads them as floats).

    Args:
        text: the document.
        source: its file, for the message.

    Raises:
        InputError: not JSON; the message gives file, line and column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{os.fspath(source)} is " if source else ""
        raise InputError(f"{where}not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
