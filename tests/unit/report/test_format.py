from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.report import _format as fmt


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (0.0, "0"),
        (-0.0, "0"),
        (7, "7"),
        (12345, "12,345"),
        (0.012345, "0.0123"),
        (0.01, "0.01"),
        (1234.5, "1,234"),
        (1e-7, "1e-7"),
        (-2.345e-9, "-2.35e-9"),
        (3e8, "3e8"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert fmt.number(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_number_keeps_three_significant_digits(value: float) -> None:
    assert float(fmt.number(value).replace(",", "")) == pytest.approx(value, rel=5.001e-3, abs=1e-307)


def test_signed_and_points() -> None:
    assert (fmt.signed(0.5), fmt.signed(-0.5), fmt.signed(0.0), fmt.signed(None)) == ("+0.5", "-0.5", "0", "-")
    assert (fmt.points(0.094), fmt.points(-0.0125), fmt.points(math.inf)) == ("+9.4 pp", "-1.2 pp", "inf")


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (1.0, "100 %"),
        (0.0, "0 %"),
        (0.9, "90 %"),
        (0.58, "58 %"),
        (0.29, "29 %"),
        (0.8999, "89.9 %"),
        (0.99999, "99.9 %"),
        (1 - 1e-13, "99.9 %"),
        (1e-9, "< 0.1 %"),
        (1.5, "150 %"),
        (None, "-"),
        (math.nan, "nan"),
    ],
)
def test_percent(ratio: float | None, text: str) -> None:
    assert fmt.percent(ratio) == text


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_percent_never_crosses_a_threshold(part: int, whole: int) -> None:
    part, whole = sorted((part, whole))
    shown = fmt.percent(part / whole).removeprefix("< ").removesuffix(" %")
    assert (float(shown) == 100) == (part == whole)
    assert (float(shown) < 90) == (part / whole < 0.9)


def test_clip_says_what_is_left_out() -> None:
    assert fmt.clip("abc", 3) == "abc"
    assert fmt.clip("x" * 2000, 5) == "xxxxx... (2,000 characters)"
    assert fmt.one_line("a\n  b\tc") == "a b c"
    assert len(fmt.one_line("word " * 50, 24)) == 24


def test_visible_escapes_what_moves_a_cursor() -> None:
    assert fmt.visible("a\x1b[2J\n\x00\u202e\ud800") == "a\\x1b[2J\\n\\x00\\u202e\\ud800"
