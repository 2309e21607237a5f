"""Moments of every dtype and layout against numpy float64, and their merge as an operation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trimtab.errors import InputError
from trimtab.numerics import Moments, moments, tensor_statistics

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64),
    *(torch.bool, torch.complex32, torch.complex64, torch.complex128),
)


def example(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if dtype.is_complex:
        with_phase = torch.randn(3, 1111, generator=generator, dtype=torch.complex64)
        return (
            torch.view_as_complex(torch.view_as_real(with_phase).half())
            if dtype == torch.complex32
            else (with_phase.to(dtype))
        )
    if dtype.is_floating_point:
        return torch.randn(3, 1111, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 120, (3, 1111), generator=generator).to(dtype)


def wide(tensor: torch.Tensor) -> np.ndarray:
    if tensor.is_complex():
        return np.abs(tensor.to(torch.complex128).numpy())
    return (tensor.float() if tensor.element_size() == 1 else tensor).double().numpy()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_is_numpy_s(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_CHUNK", 1000)
    whole = example(dtype)
    for tensor in (whole, whole.t(), whole[:, ::2], whole[0, 0], whole[1:, 5:700]):
        plain = wide(tensor)
        found = tensor_statistics(tensor)
        assert found.mean == pytest.approx(plain.mean(), rel=1e-12, abs=1e-13)
        assert found.std == pytest.approx(plain.std(), rel=1e-12, abs=1e-13)
        assert found.absmax == pytest.approx(np.abs(plain).max(), rel=1e-15)
        again = Moments.of(tensor)
        assert (again.mean, again.std, again.absmax, again.count) == (*found[:3], plain.size)
        assert again.rms == pytest.approx(float(np.sqrt(np.mean(plain**2))), rel=1e-12)


def test_signs_and_extremes_of_integers_count_by_value() -> None:
    found = tensor_statistics(torch.tensor([-128, 127], dtype=torch.int8))
    assert (found.mean, found.std, found.absmax) == (-0.5, 127.5, 128.0)
    assert tensor_statistics(torch.tensor([2**64 - 1], dtype=torch.uint64)).absmax == 2.0**64
    assert tensor_statistics(torch.tensor([-(2**63)])).mean == -(2.0**63)


def test_an_offset_of_1e8_survives_blocks_and_merges_where_the_naive_formula_fails() -> None:
    values = torch.tensor([1e8, 1e8 + 1e-3] * 4096, dtype=torch.float64)
    step = float(values[1] - values[0])
    naive = float((values**2).mean() - values.mean() ** 2)
    assert abs(naive - (step / 2) ** 2) > 1e3 * (step / 2) ** 2
    merged = Moments()
    for part in values.split(1000):
        merged = merged.merge(Moments.of(part))
    for found in (Moments.of(values), merged):
        assert found.std == pytest.approx(step / 2, rel=1e-4)


def test_merging_with_nothing_changes_nothing_but_the_counts() -> None:
    some = Moments.of(torch.tensor([1.0, 2.0, 6.0]))
    nothing = Moments.of(torch.tensor([math.nan, math.inf, -math.inf]))
    assert (nothing.count, nothing.nan_count, nothing.inf_count) == (0, 1, 2) and math.isnan(nothing.std)
    for merged in (some.merge(nothing), nothing.merge(some)):
        assert (merged.count, merged.mean, merged.m2, merged.absmax) == (3, 3.0, 14.0, 6.0)
        assert (merged.nan_count, merged.inf_count) == (1, 2)
    assert some.merge(Moments()) == some == Moments().merge(some)


def test_what_is_not_finite_is_left_out_of_its_block_only() -> None:
    values = torch.arange(5000.0, dtype=torch.float64)
    values[[0, 1023, 1024, 3000]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan], dtype=torch.float64)
    rest = values[values.isfinite()].numpy()
    found = tensor_statistics(values)
    assert (found.nan_count, found.inf_count, found.absmax) == (2, 2, 4999.0)
    assert found.mean == pytest.approx(rest.mean(), rel=1e-13) and found.std == pytest.approx(rest.std(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_no_dense_tensor_is_refused() -> None:
    for bad in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.zeros(3, device="meta")):
        with pytest.raises(InputError, match="dense"):
            tensor_statistics(bad)
