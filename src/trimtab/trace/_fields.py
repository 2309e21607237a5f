"""The columns that a caller may give with a record, checked before they are queued."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, cast

from trimtab.errors import InputError
from trimtab.sites import Site
from trimtab.trace._format import EDITS, IDENTITY, KINDS, nearest_name


class RecordFields(TypedDict, total=False):
    """Columns of a record that `write` takes by name; all may be left out."""

    phase: str
    """What the program was doing; "inference" unless given."""
    step: int
    micro_step: int
    rank: int
    """Logical rank of the tensor; the writer's unless given."""
    tp_rank: int | None
    pp_rank: int | None
    cp_rank: int | None
    ep_rank: int | None
    dp_rank: int | None
    site: str | Site | None
    layer: int | None
    """0-based; taken from `site` unless given."""
    call_index: int
    """How often this site ran before in this micro step."""
    edit: str
    """"none", or whether the tensor was taken "before" or "after" the ops at its site."""
    config: str
    prompt: int | None
    request: str | None
    positions: Any
    """0-based positions in the sequence, one per row: any sequence of integers, or a tensor."""
    dims: str | None
    """Names of the dimensions and how they are sharded, such as "b s h[tp]"."""
    kind: str
    """"value", "grad", "param" or "optim"."""
    source_file: str | None
    source_line: int | None
    module_path: str | None
    module_class: str | None
    recompute: bool
    """Whether activation checkpointing ran this a second time."""


_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(IDENTITY),
    "phase": "inference",
    "step": 0,
    "micro_step": 0,
    "call_index": 0,
    "edit": "none",
    "config": "",
    "kind": "value",
    "recompute": False,
}
_NONE = type(None)
_OPTIONAL = (
    frozenset(RecordFields.__annotations__)
    - {name for name, value in _DEFAULTS.items() if value is not None}
    - {"rank"}
)
_EXACT: dict[str, frozenset[type]] = {
    name: frozenset(
        {{"Int64": int, "String": str, "Boolean": bool}.get(str(IDENTITY[name]), _NONE)}
        | ({_NONE} if name in _OPTIONAL else set())
    )
    for name in RecordFields.__annotations__
}
_LAYER = re.compile(r"layers\.(\d+)\.")


def make_row(name: str, fields: RecordFields, rank: int) -> dict[str, Any]:
    """Return the identity columns of a record in the format's order; what only the writer knows is still None.

    Raises:
        InputError: a field that is no column, or a value of the wrong type.
    """
    row = _DEFAULTS | cast("dict[str, Any]", fields)
    for field, value in fields.items():
        if value.__class__ not in _EXACT.get(field, ()):
            row[field] = _coerce(field, value)
    _check_text(name, row)
    site = row["site"]
    if site is not None and row["layer"] is None:
        row["layer"] = _layer_of(site)
    if row["edit"] not in EDITS or row["kind"] not in KINDS:
        field, choices = ("edit", EDITS) if row["edit"] not in EDITS else ("kind", KINDS)
        raise InputError(f"{field}={row[field]!r}: choose one of {', '.join(choices)}")
    row["name"] = name
    if "rank" not in fields:
        row["rank"] = rank
    return row


def _coerce(field: str, value: Any) -> Any:
    if field not in _EXACT:
        raise InputError(
            f"write() has no field {field!r}: {nearest_name(field, _EXACT)}there are {', '.join(sorted(_EXACT))}"
        )
    if field == "site" and isinstance(value, Site):
        return str(value)
    if value is not None or field in _OPTIONAL:
        expected = str(IDENTITY[field])
        readers: dict[str, Callable[[Any], Any]] = {
            "Int64": operator.index,
            "String": _text,
            "Boolean": _boolean,
            "List(Int64)": _integers,
        }
        try:
            return readers[expected](value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{field}={value!r}: {expected} was expected ({error})") from error
    raise InputError(f"{field}=None: leave it out, or give a value")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {type(value).__name__}")
    return str(value)


def _boolean(value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"got {type(value).__name__}")
    return bool(value)


def _integers(value: Any) -> list[int] | None:
    if value is None:
        return None
    listed = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable):
        raise TypeError(f"got {type(value).__name__}")
    return [operator.index(one) for one in listed]


def _check_text(name: Any, row: Mapping[str, Any]) -> None:
    if not isinstance(name, str):
        raise InputError(f"a record's name is text, got {type(name).__name__}")
    for text in (name, row["site"], row["request"], row["config"], row["phase"]):
        if text is not None and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{text!r} holds half a surrogate pair, which is no character: {error}") from error


@functools.lru_cache(maxsize=4096)
def _layer_of(site: str) -> int | None:
    match = _LAYER.match(site)
    return None if match is None else int(match[1])
