"""Whole matrices: norms, cosine, and the randomised spectrum against exact decompositions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.weights import compare_matrices
from trimtab.weights.matrices import _fourth_power, frobenius, spectrum


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int, power: float, seed: int = 0) -> Tensor:
    """A matrix with singular values 1 / i^power."""
    size = min(rows, columns)
    u, v = (torch.linalg.qr(noise(n, size, seed=seed + i).double()).Q for i, n in enumerate((rows, columns)))
    return (u * torch.arange(1, size + 1).double().pow(-power)) @ v.T


def exact(matrix: Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(200, 320), (320, 200)])
def test_the_error_of_the_spectrum_covers_the_truth(shape: tuple[int, int], power: float) -> None:
    matrix = decaying(*shape, power)
    true = exact(matrix)
    for seed in range(5):
        found = spectrum(matrix, rank=32, seed=seed)
        values = np.array(found.singular_values)
        assert len(values) == 32 and (np.diff(values) <= 0).all()
        assert (values <= true[:32] * (1 + 1e-12)).all()
        assert (true[:32] <= np.sqrt(values**2 + found.error**2)).all()
        # an error that says nothing would cover the truth too: at most 3 times what was missed
        assert found.error <= 3 * true[32]
        effective = (true**2).sum() ** 2 / (true**4).sum()
        assert abs(found.effective_rank - effective) <= 5 * found.effective_rank_error + 1e-9 * effective
        assert found.effective_rank_error <= 0.3 * effective


def test_a_low_rank_change_is_found_exactly() -> None:
    matrix = noise(300, 3, seed=1).double() @ noise(3, 400, seed=2).double()
    found, true = spectrum(matrix, rank=8), exact(matrix)
    np.testing.assert_allclose(found.singular_values[:3], true[:3], rtol=1e-12)
    assert max(found.singular_values[3:]) < 1e-10 * true[0]
    assert found.error < 1e-10 * true[0]
    assert found.effective_rank == pytest.approx((true**2).sum() ** 2 / (true**4).sum(), rel=1e-10)


def test_equal_singular_values_count_as_many_directions() -> None:
    basis = torch.linalg.qr(noise(400, 12).double()).Q
    assert spectrum(basis @ basis.T, rank=16).effective_rank == pytest.approx(12, rel=1e-9)
    assert spectrum(torch.eye(500, dtype=torch.float64), rank=16).effective_rank == pytest.approx(500, rel=0.2)


def test_the_estimate_of_the_tail_holds_for_any_basis() -> None:
    """A basis that captures little leaves large mixed terms, which a good one hides."""
    matrix = decaying(120, 90, 0.4)
    basis = torch.linalg.qr(noise(120, 20, seed=5).double()).Q
    small = basis.T @ matrix
    missed = (matrix - basis @ small) @ noise(90, 20000, seed=6).double()
    fourth, deviation = _fourth_power(matrix, basis, small, torch.linalg.svdvals(small), missed)
    true = (exact(matrix) ** 4).sum()
    assert deviation < 0.01 * true
    assert abs(fourth - true) < 5 * deviation


def test_small_matrices_are_decomposed_exactly() -> None:
    matrix = noise(40, 70)
    found = spectrum(matrix, rank=32)
    np.testing.assert_allclose(found.singular_values, exact(matrix)[:32], rtol=1e-12)
    assert (found.error, found.effective_rank_error) == (0.0, 0.0)
    assert len(spectrum(noise(5, 70), rank=32).singular_values) == 5


def test_the_same_seed_gives_the_same_spectrum() -> None:
    matrix = noise(200, 300)
    assert spectrum(matrix, seed=4) == spectrum(matrix, seed=4)
    assert spectrum(matrix, seed=4) != spectrum(matrix, seed=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norms_and_cosine_are_those_of_the_flat_matrices(dtype: torch.dtype) -> None:
    base, tuned = noise(150, 210).to(dtype), (noise(150, 210) + 0.1 * noise(150, 210, seed=3)).to(dtype)
    a, b = base.double().numpy().ravel(), tuned.double().numpy().ravel()
    found = compare_matrices(base, tuned)
    assert found.base_norm == pytest.approx(np.linalg.norm(a), rel=1e-12)
    assert found.tuned_norm == pytest.approx(np.linalg.norm(b), rel=1e-12)
    # the difference of two float32 or bfloat16 matrices is rounded to float32
    assert found.change_norm == pytest.approx(np.linalg.norm(b - a), rel=1e-6)
    assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert found.relative_change == found.change_norm / found.base_norm
    assert found.spectrum.singular_values[0] == pytest.approx(exact(tuned.double() - base.double())[0], rel=0.02)


def test_matrices_larger_than_a_piece_are_summed_whole() -> None:
    matrix = torch.full((1100, 1000), 0.5)
    assert frobenius(matrix) == pytest.approx(0.5 * math.sqrt(1.1e6), rel=1e-14)


def test_nothing_changed_and_zero_matrices() -> None:
    same = compare_matrices(noise(90, 120), noise(90, 120))
    assert (same.change_norm, same.relative_change) == (0.0, 0.0)
    assert same.cosine == pytest.approx(1, abs=1e-15) and same.cosine <= 1
    assert set(same.spectrum.singular_values) == {0.0} and same.spectrum.effective_rank == 0
    zero = torch.zeros(90, 120)
    both, one = compare_matrices(zero, zero), compare_matrices(zero, noise(90, 120))
    assert (both.cosine, both.relative_change) == (1.0, 0.0)
    assert (one.cosine, one.relative_change) == (0.0, math.inf)


def test_a_norms_weight_is_compared_as_a_vector() -> None:
    weight = noise(64).abs() + 0.5
    scaled = compare_matrices(weight, 1.5 * weight)
    assert scaled.cosine == pytest.approx(1, abs=1e-12)
    assert scaled.tuned_norm / scaled.base_norm == pytest.approx(1.5, rel=1e-6)
    assert scaled.spectrum.singular_values == pytest.approx([scaled.change_norm])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \[3, 4\] and \[4, 3\]; one shape was expected"):
        compare_matrices(noise(3, 4), noise(4, 3))
    with pytest.raises(InputError, match="rank 0; 1 or more"):
        spectrum(noise(3, 4), rank=0)
