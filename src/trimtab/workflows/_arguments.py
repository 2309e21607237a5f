"""Arguments of the public calls, checked against their annotations before anything is loaded or written."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from trimtab.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    os.PathLike: "a path",
    Mapping: "a mapping",
    Sequence: "a list",
    Callable: "a function",
    NoneType: "None",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments of another type than the annotations of `function` say, in one line.

    Numbers of other libraries are passed on as Python's. What a list holds is checked where it is text alone; the
    items of anything else are the business of whoever reads them.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        kinds = _kinds(function)
        for name, value in bound.arguments.items():
            kind = kinds[name]
            if not _fits(value, kind):
                raise InputError(f"{name} is {value!r:.80}; {_words(kind)} was expected")
            bound.arguments[name] = _plain(value)
        return function(*bound.args, **bound.kwargs)

    return call


@functools.cache
def _kinds(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is Sequence:
        texts = inner == (str,) and isinstance(value, (list, tuple))
        listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
        return listed and (not texts or all(isinstance(item, str) for item in value))
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, os.PathLike)
    return kind is Any or isinstance(value, origin or kind)


def _plain(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is Sequence and inner == (str,):
        return "a list of text"
    found = origin or kind
    return _WORDS.get(found) or f"a {found.__name__}"
