"""Results to JSON and back: one schema per class, non-finite numbers as strings."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from trimtab._base import jsonio
from trimtab.errors import InputError

T = TypeVar("T")


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    """Building one takes milliseconds, so each is built once."""
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_dict(result: object) -> dict[str, Any]:
    """Return `result` as plain Python containers; non-finite floats stay floats."""
    plain: dict[str, Any] = _adapter(type(result)).dump_python(result, mode="python")
    return plain


def to_json(result: object, *, indent: int | None = 2) -> str:
    """Serialise a result dataclass.

    Args:
        result: an instance of a class of `trimtab.results`.
        indent: spaces per level; None writes one line.

    Returns:
        One JSON document; NaN and infinities are the strings "nan", "inf", "-inf".
    """
    return jsonio.dumps(to_dict(result), indent=indent)


def from_json(cls: type[T], text: str) -> T:
    """Read what `to_json` wrote.

    Raises:
        InputError: a newer version wrote it, or it does not fit the schema; the message names the first field at fault.
    """
    try:
        document = jsonio.loads(text)
        _check_version(cls, document)
        value: T = _adapter(cls).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"not a {cls.__name__} document: {where or 'top level'}: {first['msg']}") from error
    return value


def _check_version(cls: type[Any], document: Any) -> None:
    known = getattr(cls, "__dataclass_fields__", {}).get("format_version")
    found = document.get("format_version") if isinstance(document, dict) else None
    if known is not None and isinstance(found, int) and found > known.default:
        raise InputError(
            f"a {cls.__name__} document of format version {found}; this trimtab reads versions up to {known.default}: "
            "upgrade trimtab"
        )


def schema(cls: type[Any]) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a result class."""
    document: dict[str, Any] = _adapter(cls).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}
