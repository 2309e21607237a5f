"""A sequence that is partly a table is the sequence that it stands for."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import polars as pl
import pytest
from pydantic import TypeAdapter

from trimtab.results._lazy import LazySequence

built: list[int] = []


def of_row(row: Mapping[str, Any]) -> str:
    """Build an item; say that it was built."""
    built.append(row["number"])
    return f"row {row['number']}"


def mixed() -> LazySequence[str]:
    return LazySequence(
        ["one", "two"], table=pl.DataFrame({"number": [5, 6, 7]}), build=of_row, order=[0, ~0, 1, ~1, 2]
    )


WHOLE = ("row 5", "one", "row 6", "two", "row 7")


def test_it_is_the_sequence_in_order() -> None:
    lazy = mixed()
    assert tuple(lazy) == WHOLE and len(lazy) == 5 and lazy.rows == 3
    assert [lazy[at] for at in range(-5, 5)] == [*WHOLE, *WHOLE]
    assert lazy[1:4] == WHOLE[1:4] and lazy[::-2] == WHOLE[::-2]
    assert lazy == WHOLE and lazy == list(WHOLE) and lazy != WHOLE[:4] and lazy != 5
    assert hash(lazy) == hash(mixed()) and repr(lazy) == repr(WHOLE)
    with pytest.raises(IndexError):
        lazy[5]


def test_rows_are_built_only_where_they_are_asked_for() -> None:
    lazy = mixed()
    built.clear()
    assert len(lazy) == 5 and lazy.single == ("one", "two") and lazy[3] == "two" and built == []
    assert lazy[2] == "row 6" and built == [6]


def test_more_rows_than_are_built_at_a_time() -> None:
    count = 10_000
    lazy = LazySequence[str](table=pl.DataFrame({"number": range(count)}), build=of_row, order=range(count))
    assert list(lazy) == [f"row {number}" for number in range(count)]


def test_without_a_table_it_is_its_items() -> None:
    assert tuple(LazySequence("ab")) == ("a", "b") and not LazySequence[str]() and LazySequence("ab").rows == 0


def test_it_travels_to_a_process_and_through_json() -> None:
    assert pickle.loads(pickle.dumps(mixed())) == WHOLE
    adapter = TypeAdapter(LazySequence[str])
    assert adapter.dump_python(mixed()) == list(WHOLE)
    assert adapter.validate_python(list(WHOLE)) == mixed()
    assert adapter.json_schema() == {"type": "array", "items": {"type": "string"}}
