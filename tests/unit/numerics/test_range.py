"""Values whose squares or bits do not fit float64: every row, sample and integer at its own scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from trimtab import stats
from trimtab.errors import InputError
from trimtab.numerics import compare_pair, compare_pair_coarser, round_to


def scaled_rows(exponents: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two ordinary matrices of that dtype, and the factor 2^exponent of each row."""
    generator = torch.Generator().manual_seed(0)
    reference, candidate = (
        torch.randn(len(exponents), 300, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2)
    )
    candidate = reference + candidate * 1e-3
    return reference, candidate, torch.tensor([math.ldexp(1.0, e) for e in exponents], dtype=torch.float64)[:, None]


@pytest.mark.parametrize("engine", ["numba", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("exponents", [[0, -600, 3, -900], [900, -900, 0, -540], [-1000, -700], [-505, 0, -480]])
def test_every_row_of_float64_has_its_own_scale(exponents: list[int], dtype: torch.dtype, engine: str) -> None:
    """A power of two changes no figure of a row but its size."""
    reference, candidate, factor = scaled_rows(exponents, dtype)
    plain = compare_pair(reference, candidate, engine=engine)
    found = compare_pair(reference * factor, candidate * factor, engine=engine)
    np.testing.assert_allclose(found.row_rel_l2, plain.row_rel_l2, rtol=1e-12)
    np.testing.assert_allclose(found.row_cosine, plain.row_cosine, rtol=1e-12)
    sizes = factor[:, 0].numpy()
    np.testing.assert_allclose(found.row_norm, plain.row_norm * sizes, rtol=1e-12)
    np.testing.assert_allclose(found.row_error, plain.row_error * sizes, rtol=1e-12)
    assert found.cosine == pytest.approx(plain.cosine, rel=1e-12)
    assert found.cosine_min == pytest.approx(plain.cosine_min, rel=1e-12)
    few = compare_pair(reference * factor, candidate * factor, engine=engine, per_row=False)
    assert few.cosine == pytest.approx(found.cosine) and few.row_norm.size == 0


def test_a_tiny_row_against_zeros_and_beside_nan_keeps_its_meaning() -> None:
    reference = torch.tensor([[1.0, 2.0], [1e-200, 0.0], [0.0, 0.0], [0.0, 0.0], [math.nan, 1e-170]]).double()
    reference[1, 0], reference[4, 1] = 1e-200, 1e-170
    candidate = reference.clone()
    candidate[1, 0], candidate[3, 1] = 2e-200, 1e-300
    for engine in ("numba", "torch"):
        found = compare_pair(reference, candidate, engine=engine)
        assert found.row_rel_l2.tolist() == pytest.approx([0.0, 1.0, 0.0, math.inf, 0.0])
        assert found.row_cosine.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0, 1.0])
        assert found.row_norm[4] == pytest.approx(1e-170)


def nearest(value: int, bits: int) -> int:
    """Round an integer to so many significant bits, ties to even, in integers."""
    drop = max(abs(value).bit_length() - bits, 0)
    quotient, rest = divmod(abs(value), 1 << drop)
    half = (1 << drop) // 2
    quotient += drop > 0 and (rest > half or (rest == half and quotient % 2 == 1))
    return (quotient << drop) * (1 if value >= 0 else -1)


@given(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 54).map(lambda n: 2**62 + 2**54 + 2**n))
@example(2**62 + 2**54 + 1)
@example(-(2**62) - 2**54 - 1)
@example(2**62 + 2**54)
@example(-(2**63))
def test_signed_integers_round_once(value: int) -> None:
    found = round_to(torch.tensor([value, -(value + 1)]), torch.bfloat16)
    assert found.double().tolist() == [float(nearest(value, 8)), float(nearest(-(value + 1), 8))]


@given(st.integers(0, 2**64 - 1) | st.integers(0, 55).map(lambda n: 2**63 + 2**55 + 2**n))
@example(2**63 + 2**55 + 1)
@example(2**32 - 1)
def test_unsigned_integers_round_once(value: int) -> None:
    wide = torch.from_numpy(np.array([value], np.uint64))
    assert round_to(wide, torch.bfloat16).double().item() == float(nearest(value, 8))
    if value < 2**32:
        narrow = torch.from_numpy(np.array([value], np.uint32))
        assert round_to(narrow, torch.bfloat16).double().item() == float(nearest(value, 8))


@pytest.mark.parametrize("pair", [([1.0], torch.ones(1)), (torch.ones(1), None), (np.ones(1), np.ones(1))])
def test_what_is_no_tensor_is_refused(pair: tuple[object, object]) -> None:
    for compare in (compare_pair, compare_pair_coarser):
        with pytest.raises(InputError, match=r"expected a torch\.Tensor"):
            compare(*pair)  # type: ignore[arg-type]


@pytest.mark.parametrize("exponent", [-1000, -600, -500, 0, 500, 990])
def test_a_scale_changes_no_test_and_no_relative_interval(exponent: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1.0, 12), rng.normal(0.0, 2.0, 30)
    expected = ttest_ind(a, b, equal_var=False)
    found = stats.welch_t(np.ldexp(a, exponent), np.ldexp(b, exponent))
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    plain, scaled = (stats.bootstrap_mean(np.ldexp(a, one), seed=1) for one in (0, exponent))
    for name in ("estimate", "low", "high"):
        assert math.ldexp(getattr(scaled, name), -exponent) == pytest.approx(getattr(plain, name), rel=1e-9)


def test_a_tiny_variance_on_a_large_mean_is_no_division_by_zero() -> None:
    found = stats.welch_t([1e-200, 2e-200, 3e-200], [1.0, 1.0, 1.0])
    assert found.statistic < -1e150 and found.p_value == 0.0
