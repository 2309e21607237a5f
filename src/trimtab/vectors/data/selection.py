"""Which examples to take: `name:label=pos,score>=75`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.errors import InputError

_CONDITION = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*")
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


class Condition(NamedTuple):
    """A column, how it is compared, and with what."""

    column: str
    operator: str
    value: str

    def matches(self, found: str | float | None) -> bool:
        """Whether a row's value meets the condition; a missing one never does."""
        if found is None:
            return False
        if self.operator in _ORDER:
            number = _number(found)
            return number is not None and _ORDER[self.operator](number, float(self.value))
        left, right = _number(found), _number(self.value)
        same = str(found) == self.value or (left is not None and left == right)
        return same if self.operator == "=" else not same


@dataclass(frozen=True, slots=True)
class Selection:
    """Conditions that all must hold."""

    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Read `column=value`, `!=`, `>=`, `<=`, `>`, `<`, separated by commas.

        Raises:
            InputError: a part is no condition, or compares by size with what is no number.
        """
        found = []
        for part in text.split(","):
            match = _CONDITION.fullmatch(part)
            if match is None:
                raise InputError(
                    f"selection {text!r}: {part.strip()!r} is no condition; write column=value, or !=, >=, <=, >, <, "
                    "such as label=pos,score>=75"
                )
            condition = Condition(*match.groups())
            if condition.operator in _ORDER and _number(condition.value) is None:
                raise InputError(f"selection {text!r}: {condition.value!r} is not a number to compare with by size")
            found.append(condition)
        return cls(tuple(found))

    def matches(self, row: Mapping[str, str | float | None], columns: Sequence[str], name: str) -> bool:
        """Whether a row meets all conditions.

        Raises:
            InputError: a condition names a column that no row has.
        """
        for condition in self.conditions:
            if condition.column not in columns:
                raise InputError(
                    f"{name}: no column {condition.column!r} for selection {str(self)!r}; it has: {', '.join(columns)}"
                )
        return all(condition.matches(row.get(condition.column)) for condition in self.conditions)

    def __str__(self) -> str:
        return ",".join("".join(condition) for condition in self.conditions)


def split_name(text: str) -> tuple[str, Selection | None]:
    """Split `name:label=pos,score>=75` into the name and its selection; None when there is none."""
    head, colon, tail = text.rpartition(":")
    if colon and head and re.search(r"[=<>]", tail):
        return head, Selection.parse(tail)
    return text, None


def _number(value: str | float) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
