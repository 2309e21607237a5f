"""ULP distance against the sorted list of all values of a format; rounding against exact nearest-even."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import InputError
from trimtab.numerics import max_ulp, round_to, ulp_distance
from trimtab.numerics.ulp import INCOMPARABLE, max_ulp_finite

SMALL = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def finite_values(dtype: torch.dtype) -> list[float]:
    """Every finite value of a format in order, zero once."""
    bits = torch.arange(256).to(torch.uint8) if dtype.itemsize == 1 else torch.arange(-(2**15), 2**15).to(torch.int16)
    wide = bits.view(dtype).float()
    return sorted(set(wide[wide.isfinite()].tolist()))


VALUES = {dtype: finite_values(dtype) for dtype in SMALL}


@given(st.sampled_from(SMALL), st.data())
def test_distance_is_the_number_of_steps_in_the_sorted_values(dtype: torch.dtype, data: st.DataObject) -> None:
    every = VALUES[dtype]
    index = st.integers(0, len(every) - 1)
    i, j, k = (data.draw(index) for _ in range(3))
    x, y, z = (torch.tensor([every[n]]).to(dtype) for n in (i, j, k))
    assert int(ulp_distance(x, y, dtype)) == abs(i - j) == int(ulp_distance(y, x, dtype))
    assert int(ulp_distance(x, z, dtype)) <= int(ulp_distance(x, y, dtype)) + int(ulp_distance(y, z, dtype))


@given(st.sampled_from(SMALL), st.floats(-60000, 60000) | st.floats(-1e-3, 1e-3))
def test_rounding_is_nearest_even_of_the_exact_value(dtype: torch.dtype, x: float) -> None:
    every = VALUES[dtype]
    if not every[0] <= x <= every[-1]:
        return
    found = float(round_to(torch.tensor([x], dtype=torch.float64), dtype).float())
    place = bisect.bisect_left(every, x)
    low, high = every[max(place - 1, 0)], every[place]
    gaps = Fraction(x) - Fraction(low), Fraction(high) - Fraction(x)
    if gaps[0] == gaps[1]:
        zero = every.index(0.0)
        assert found == (low if (max(place - 1, 0) - zero) % 2 == 0 else high)
    else:
        assert found == (low if gaps[0] < gaps[1] else high)


@given(st.sampled_from(SMALL[:2]), st.data())
def test_a_tie_is_broken_by_what_lies_below_float32(dtype: torch.dtype, data: st.DataObject) -> None:
    every = VALUES[dtype]
    place = data.draw(st.integers(1, len(every) - 2))
    low, high = every[place], every[place + 1]
    middle = (low + high) / 2
    shift = max(abs(middle) * 2.0**-45, 2.0**-1000)
    for x, nearest in ((middle - shift, low), (middle + shift, high)):
        assert float(round_to(torch.tensor([x], dtype=torch.float64), dtype).float()) == nearest


def test_integers_round_once() -> None:
    x = torch.tensor([2**62 + 2**38 + 1])  # in float64 a tie of float32, which would go down
    assert int(ulp_distance(x, torch.tensor([2.0**62 + 2.0**39], dtype=torch.float64), "float32")) == 0


@given(st.floats(allow_nan=False), st.integers(0, 20))
def test_float64_steps_are_nextafter_s(x: float, steps: int) -> None:
    y = x
    for _ in range(steps):
        y = math.nextafter(y, 0.0 if x > 0 else math.inf)
    reached = steps if x <= 0 or y > 0 else None
    a, b = (torch.tensor([v], dtype=torch.float64) for v in (x, y))
    if reached is not None and math.isfinite(y):
        assert int(ulp_distance(a, b, "float64")) == steps


def test_edges_of_the_count() -> None:
    huge = torch.tensor([1e300], dtype=torch.float64)
    assert int(ulp_distance(huge, -huge, "float64")) == INCOMPARABLE
    top = torch.tensor([torch.finfo(torch.float16).max]).half()
    assert int(ulp_distance(top, torch.tensor([math.inf]), "float16")) == 1
    nan, one = torch.tensor([math.nan]), torch.tensor([1.0])
    for dtype in SMALL:
        assert [int(ulp_distance(*pair, dtype)) for pair in ((nan, nan), (nan, one), (one, nan))] == [
            0,
            INCOMPARABLE,
            INCOMPARABLE,
        ]
        assert int(ulp_distance(torch.tensor([-0.0]), torch.tensor([0.0]), dtype)) == 0
    assert max_ulp(torch.zeros(0), torch.zeros(0), "bf16") == 0
    assert max_ulp(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0 + 2**-6]), "bf16") == 2


def test_what_has_no_steps_is_refused() -> None:
    one = torch.ones(1)
    for a, b, dtype, said in (
        (one, one, "int32", "no ULP in int32"),
        (one, torch.ones(2), "float32", "equal shapes"),
        (one + 1j, one + 1j, "float32", r"\.real and"),
    ):
        with pytest.raises(InputError, match=said):
            ulp_distance(a, b, dtype)


SPECIAL = (0.0, -0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 6e-8, math.inf, -math.inf, math.nan)


@given(st.sampled_from(["float32", "bfloat16", "float16", "float64", "float8_e5m2"]), st.data())
def test_the_largest_distance_is_the_maximum_of_all(dtype: str, data: st.DataObject) -> None:
    values = st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), min_size=3, max_size=3)
    a, b = (torch.tensor(data.draw(values)) for _ in range(2))
    assert max_ulp(a, b, dtype) == int(ulp_distance(a, b, dtype).max())
    finite = bool(a.isfinite().all() and b.isfinite().all())
    assert max_ulp_finite(a, b, dtype) == (max_ulp(a, b, dtype) if finite else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_distance_is_found_anywhere(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 1001, generator=generator).to(dtype)
    for row, column in ((0, 0), (2, 500), (4, 1000)):
        b = a.clone()
        b[row, column] = -a[row, column]
        assert max_ulp(a, b, dtype) == int(ulp_distance(a, b, dtype).max()) > 1000
        assert max_ulp(a.T, b.T, dtype) == max_ulp(a[:, column], b[:, column], dtype) == max_ulp(a, b, dtype)


def test_the_widest_distances_do_not_wrap() -> None:
    for dtype, bits in (("float32", 0x7F800000), ("bfloat16", 0x7F80), ("float16", 0x7C00)):
        low, high = torch.tensor([-math.inf]), torch.tensor([math.inf])
        assert max_ulp(low, high, dtype) == max_ulp(high, low, dtype) == 2 * bits
        assert max_ulp(torch.tensor([math.nan]), torch.tensor([math.nan]), dtype) == 0
    assert max_ulp_finite(torch.tensor([1e30]), torch.tensor([1e30]), "float16") == 0  # infinite in float16 only
