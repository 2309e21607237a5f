"""The chunked measurement against numpy in float64 and exact integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.compare.measure import Chunk, as_rows, coordinates, measure


def of(reference: torch.Tensor, candidate: torch.Tensor, rows: int = 10**9):
    shape = (*reference.shape, 2) if reference.is_complex() else tuple(reference.shape)
    ours, theirs = as_rows(reference), as_rows(candidate)
    chunks = [Chunk(at, ours[at : at + rows], theirs[at : at + rows]) for at in range(0, len(ours), rows)]
    return measure(chunks, shape, (reference.dtype, candidate.dtype))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.integers(0, 2**31),
)
def test_metrics_equal_numpy_whatever_the_cut(rows: int, width: int, cut: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    candidate = (reference.double() + 0.01 * torch.randn(rows, width, generator=generator)).to(dtype)
    r, c = reference.double().numpy(), candidate.double().numpy()
    d = c - r
    found = of(reference, candidate, cut).metrics
    expected = {
        "mae": np.abs(d).mean(),
        "rmse": math.sqrt((d**2).mean()),
        "max_abs": np.abs(d).max(),
        "rel_l2": np.linalg.norm(d) / np.linalg.norm(r),
        "rel_diff": (d**2).sum() / ((r**2).sum() + (c**2).sum()),
        "slope": (r * c).sum() / (r**2).sum(),
        "mean_reference": r.mean(),
        "mean_candidate": c.mean(),
        "worst_channel_rms": np.sqrt((d**2).mean(axis=0)).max(),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-14), name
    assert found.numel == r.size and found.rows == rows
    assert abs(c[found.max_abs_index] - r[found.max_abs_index]) == np.abs(d).max()
    assert found.max_abs_reference == r[found.max_abs_index]
    norms = np.linalg.norm(r, axis=1)
    errors = np.linalg.norm(d, axis=1) / np.maximum(norms, 0.01 * np.sqrt((norms**2).mean()))
    assert found.worst_row_error == pytest.approx(errors.max(), rel=1e-9)


@pytest.mark.parametrize(
    ("dtype", "a", "b"),
    [
        (torch.int64, 2**24, 2**24 + 1),
        (torch.int64, 2**53, 2**53 + 1),
        (torch.int64, 2**62, 2**62 + 1),
        (torch.int32, 5, 6),
        (torch.uint8, 0, 255),
        (torch.int8, -128, 127),
    ],
)
def test_integers_are_exact(dtype: torch.dtype, a: int, b: int) -> None:
    reference = torch.tensor([[7, 7], [7, a]], dtype=dtype)
    candidate = torch.tensor([[7, 7], [7, b]], dtype=dtype)
    found = of(reference, candidate)
    assert found.exact and found.metrics.differing == 1
    assert found.first_flat == 3
    assert of(reference, reference).metrics.differing == 0
    assert (found.metrics.max_abs_index, found.metrics.max_abs_reference) == ((1, 1), a)
    assert found.metrics.max_abs_candidate == b


def test_signed_and_unsigned_integers_meet_exactly() -> None:
    found = of(torch.tensor([2**62, 1]), torch.tensor([2**62, 1], dtype=torch.uint64))
    assert found.metrics.differing == 0 and found.warnings == ("dtypes differ: int64 against uint64",)
    assert of(torch.tensor([2**62 + 1]), torch.tensor([2**62], dtype=torch.uint64)).metrics.differing == 1


def test_one_flipped_mask_bit_counts() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    flipped = mask.clone()
    flipped[10, 3] = True
    assert of(mask, flipped, rows=7).metrics.differing == 1
    assert of(mask, flipped, rows=7).first_flat == 10 * 64 + 3


def test_equal_nan_and_inf_stay_out_of_the_sums() -> None:
    reference = torch.tensor([[1.0, math.nan], [math.inf, 2.0]])
    candidate = torch.tensor([[1.5, math.nan], [math.inf, 2.0]])
    found = of(reference, candidate, rows=1)
    assert found.mismatch is None and found.metrics.nonfinite_match
    assert found.metrics.mae == pytest.approx(0.25) and found.metrics.max_abs == 0.5
    assert found.warnings == ("1 NaN and 1 Inf in the reference, left out of the sums",)


@pytest.mark.parametrize(("a", "b"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, -math.inf), (math.nan, math.inf)])
def test_nan_and_inf_elsewhere_are_a_mismatch(a: float, b: float) -> None:
    reference, candidate = torch.zeros(5, 3), torch.zeros(5, 3)
    reference[3, 1], candidate[3, 1] = a, b
    found = of(reference, candidate, rows=2)
    assert found.mismatch is not None and "row 3 channel 1" in found.mismatch
    assert found.first_flat == 10


def test_complex_keeps_the_imaginary_part() -> None:
    reference = torch.complex(torch.ones(3, 4), torch.ones(3, 4))
    candidate = torch.complex(torch.ones(3, 4), -torch.ones(3, 4))
    found = of(reference, candidate).metrics
    assert found.rel_l2 == pytest.approx(math.sqrt(2))
    assert found.max_abs_index[-1] == 1


def test_kinds_of_dtype_that_differ_do_not_compare() -> None:
    found = of(torch.ones(3), torch.ones(3, dtype=torch.int64))
    assert found.mismatch == "kinds of dtype differ: float32 against int64"


def test_different_dtypes_are_measured_twice() -> None:
    reference = torch.randn(8, 16)
    found = of(reference, reference.bfloat16())
    assert found.metrics.rel_l2 > 1e-4
    assert found.coarse is not None and found.coarse.rel_l2 == 0
    assert of(reference.half(), reference.bfloat16()).coarse is not None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_it_is(dtype: torch.dtype) -> None:
    reference = torch.randn(4, 8).to(dtype)
    assert of(reference, reference.float()).metrics.rel_l2 == 0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), ()])
def test_empty_tensors_and_scalars(shape: tuple[int, ...]) -> None:
    found = of(torch.zeros(shape), torch.zeros(shape))
    assert found.mismatch is None and found.metrics.rel_l2 == 0 and found.metrics.max_abs == 0


def test_zero_rows() -> None:
    reference = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    candidate = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    found = of(reference, candidate)
    assert found.row_error.tolist() == [0.0, 0.0, 1.0]
    assert found.metrics.worst_row == 2
    assert of(torch.zeros(2, 2), torch.ones(2, 2)).metrics.rel_l2 == math.inf


@given(st.lists(st.integers(1, 5), max_size=4), st.integers(0, 10**4))
def test_coordinates_are_numpys(shape: list[int], flat: int) -> None:
    size = math.prod(shape)
    assert coordinates(flat % size, tuple(shape)) == np.unravel_index(flat % size, shape)
