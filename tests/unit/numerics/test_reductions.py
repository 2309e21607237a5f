"""Moments, quantiles, ULP distances, tolerances and expected rounding."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import InputError
from trimtab.numerics import (
    Moments,
    QuantileSketch,
    coarser,
    dtype_name,
    expected_relative_error,
    resolve_dtype,
    tensor_statistics,
    tolerances,
    ulp_distance,
    unit_roundoff,
)
from trimtab.numerics.quantiles import RELATIVE_ERROR, quantiles
from trimtab.numerics.ulp import INCOMPARABLE

numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30)


@given(numbers, st.randoms(use_true_random=False))
def test_moments_merge_in_any_grouping_to_the_exact_ones(xs: list[float], rng: random.Random) -> None:
    parts = [Moments.of(torch.tensor([x], dtype=torch.float64)) for x in xs]
    while len(parts) > 1:
        one, two = parts.pop(rng.randrange(len(parts))), parts.pop(rng.randrange(len(parts)))
        parts.append(one.merge(two))
    exact = [Fraction(x) for x in xs]
    mean = sum(exact) / len(exact)
    variance = float(sum((x - mean) ** 2 for x in exact) / len(exact))
    whole = Moments.of(torch.tensor(xs, dtype=torch.float64))
    for found in (parts[0], whole):
        assert found.count == len(xs)
        assert found.mean == pytest.approx(float(mean), rel=1e-12, abs=1e-9)
        assert found.m2 / found.count == pytest.approx(variance, rel=1e-9, abs=1e-9)
        assert found.absmax == max(map(abs, xs))


def test_an_offset_of_1e8_loses_nothing() -> None:
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = 1e8 + noise
    expected = float((shifted - 1e8).std(unbiased=False))
    naive = math.sqrt(max(float((shifted**2).mean() - shifted.mean() ** 2), 0.0))
    assert tensor_statistics(shifted).std == pytest.approx(expected, rel=1e-9)
    assert abs(naive - expected) > 1e-3


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool]
)
def test_statistics_equal_numpy(dtype: torch.dtype) -> None:
    tensor = (torch.randn(500, generator=torch.Generator().manual_seed(1)) * 10).abs().to(dtype)
    plain = tensor.double().numpy()
    found = tensor_statistics(tensor)
    assert found.mean == pytest.approx(plain.mean(), rel=1e-12)
    assert found.std == pytest.approx(plain.std(), rel=1e-12)
    assert found.absmax == np.abs(plain).max()


def test_statistics_leave_out_and_count_what_is_not_finite() -> None:
    found = tensor_statistics(torch.tensor([1.0, math.nan, math.inf, -math.inf, 3.0]))
    assert (found.mean, found.nan_count, found.inf_count, found.absmax) == (2.0, 1, 2, 3.0)
    assert math.isnan(tensor_statistics(torch.zeros(0)).mean)


@given(numbers, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_quantiles_are_those_of_the_definition(xs: list[float], shares: list[float]) -> None:
    found = quantiles(torch.tensor(xs, dtype=torch.float64), shares)
    for share, value in zip(shares, found, strict=True):
        assert value == sorted(xs)[max(math.ceil(share * len(xs)), 1) - 1]


@given(numbers, numbers)
def test_a_merged_sketch_stays_within_its_stated_error(xs: list[float], ys: list[float]) -> None:
    shares = [0.0, 0.1, 0.5, 0.9, 1.0]
    sketch = QuantileSketch.of(torch.tensor(xs, dtype=torch.float64)).merge(
        QuantileSketch.of(torch.tensor(ys, dtype=torch.float64))
    )
    exact = quantiles(torch.tensor(xs + ys, dtype=torch.float64), shares)
    assert sketch.count == len(xs) + len(ys)
    assert np.all(np.abs(sketch.quantiles(shares) - exact) <= RELATIVE_ERROR * np.abs(exact) * (1 + 1e-12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ulp_distance_counts_every_step_of_a_16_bit_format(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    every = bits.view(dtype)
    ordered = every[every.isfinite()].double().unique()
    one, two = ordered[:-1].to(dtype), ordered[1:].to(dtype)
    assert bool((ulp_distance(one, two, dtype) == 1).all())
    far = ulp_distance(ordered[:1].to(dtype), ordered[-1:].to(dtype), dtype)
    assert int(far) == len(ordered) - 1


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 50))
def test_ulp_distance_counts_float32_steps(x: float, steps: int) -> None:
    y = np.float32(x)
    for _ in range(steps):
        y = np.nextafter(y, np.float32(math.inf))
    a, b = torch.tensor([x]), torch.tensor([float(y)])
    expected = steps if math.isfinite(float(y)) else int(ulp_distance(a, b, "float32"))
    assert int(ulp_distance(a, b, "float32")) == int(ulp_distance(b, a, "float32")) == expected


def test_ulp_distance_at_its_edges() -> None:
    tiny = torch.tensor([2.0**-149])
    assert int(ulp_distance(-tiny, tiny, "float32")) == 2
    assert int(ulp_distance(torch.tensor([-0.0]), torch.tensor([0.0]), "float32")) == 0
    nan = torch.tensor([math.nan])
    assert int(ulp_distance(nan, nan, "float32")) == 0
    assert int(ulp_distance(nan, tiny, "float32")) == INCOMPARABLE
    coarse = ulp_distance(torch.tensor([1.0]), torch.tensor([1.0 + 2.0**-10]), "bfloat16")
    assert int(coarse) == 0


def test_names_of_dtypes() -> None:
    names = {"bf16": torch.bfloat16, "half": torch.float16, "fp32": torch.float32, "float64": torch.float64}
    for name, dtype in names.items():
        assert resolve_dtype(name) == dtype and resolve_dtype(dtype_name(dtype)) == dtype
    assert unit_roundoff("bfloat16") == 2.0**-8 and unit_roundoff("float16") == 2.0**-11
    assert coarser(torch.float32, torch.bfloat16) == torch.bfloat16
    with pytest.raises(InputError, match="float3"):
        resolve_dtype("float3")


@pytest.mark.parametrize(("dtype", "base"), [("float32", 2e-6), ("float16", 8e-4), ("bfloat16", 6e-3)])
def test_the_table_of_tolerances(dtype: str, base: float) -> None:
    for layer in (0, 1, 11):
        assert tolerances.row_rel_l2(dtype, layer) == pytest.approx(base * math.sqrt(1 + 2 * layer))
    assert tolerances.decode_vs_forward() == (5e-6, 5e-6)
    with pytest.raises(InputError, match="0-based"):
        tolerances.row_rel_l2(dtype, -1)


def test_the_expected_error_is_the_formula_and_what_a_layer_measures() -> None:
    found = expected_relative_error("bfloat16", blocks_upstream=3, reduction_length=512)
    assert found == pytest.approx(math.sqrt((0.42 * 2**-8) ** 2 * 7 + (0.42 * 2**-24) ** 2 * 512))
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(256, 512, generator=generator).bfloat16() for _ in range(2))
    exact = x.double() @ w.double().T
    measured = float((exact.bfloat16().double() - exact).norm() / exact.norm())
    one = expected_relative_error("bfloat16", reduction_length=512)
    assert 0.8 < measured / one < 1.25
