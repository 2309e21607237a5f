"""JSON with non-finite numbers as strings."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab._base import jsonio
from trimtab.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, float) and not math.isfinite(a):
        return b == ("nan" if math.isnan(a) else "inf" if a > 0 else "-inf")
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@given(VALUES)
def test_every_document_is_strict_json_and_comes_back(value: object) -> None:
    text = jsonio.dumps(value)
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert same(value, strict)
    assert same(value, jsonio.loads(text))


def test_what_is_not_json_says_where() -> None:
    with pytest.raises(InputError, match="line 2 column"):
        jsonio.loads('{"a": 1,\n b}')


def test_unknown_objects_are_refused() -> None:
    with pytest.raises(TypeError):
        jsonio.dumps(object())
