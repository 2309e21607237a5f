"""Decompositions that do not give up, the rank guard, the permutation test, the manifold's dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg

from trimtab.errors import InputError, VectorError
from trimtab.vectors.clean.contamination import from_concepts, from_neutral, pairwise_cosines
from trimtab.vectors.clean.linear import decompose, prepare, remove
from trimtab.vectors.clean.manifold import choose_dimension, task_manifold

Matrix = np.ndarray[Any, np.dtype[np.float64]]
WIDTH = 32


def noise(*shape: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(size=shape)


def planted(n: int, rank: int, *, strength: float = 6.0, seed: int = 0) -> tuple[Matrix, Matrix]:
    """States with `rank` strong directions in white noise, and these directions."""
    source = np.random.default_rng(seed)
    axes = np.linalg.qr(source.normal(size=(WIDTH, rank)))[0].T
    return source.normal(size=(n, WIDTH)) + strength * source.normal(size=(n, rank)) @ axes + 3.0, axes


@pytest.mark.parametrize("failing", [(), ("gesdd",), ("gesdd", "gesvd")])
@pytest.mark.parametrize("shape", [(7, WIDTH), (50, WIDTH)])
def test_every_route_spans_the_same(
    monkeypatch: pytest.MonkeyPatch, failing: tuple[str, ...], shape: tuple[int, int]
) -> None:
    matrix = noise(*shape)
    _, values, rows = np.linalg.svd(matrix, full_matrices=False)
    real = scipy.linalg.svd

    def svd(given: Matrix, **options: Any) -> Any:
        if options["lapack_driver"] in failing:
            raise np.linalg.LinAlgError("did not converge")
        return real(given, **options)

    monkeypatch.setattr(scipy.linalg, "svd", svd)
    found = decompose(matrix)
    assert found.route == {0: "gesdd", 1: "gesvd", 2: "eigh"}[len(failing)]
    assert np.allclose(found.values, values, rtol=1e-9)
    assert np.allclose(np.abs(np.sum(found.rows * rows, axis=1)), 1.0, atol=1e-9)
    assert np.allclose(found.rows @ found.rows.T, np.eye(len(found.rows)), atol=1e-9)


def test_rows_are_checked_before_they_are_decomposed() -> None:
    with pytest.raises(InputError, match="states: 1 rows were collected; at least 2"):
        prepare(noise(1, 4), "states", center=True, normalise_rows=False)
    with pytest.raises(InputError, match="all the same"):
        prepare(np.tile(noise(1, 4), (5, 1)), "states", center=True, normalise_rows=True)
    bad = noise(3, 4)
    bad[2, 1] = np.inf
    with pytest.raises(VectorError, match="row 2 of 3 is not finite"):
        prepare(bad, "states", center=True, normalise_rows=False)


def test_normalised_rows_weigh_alike() -> None:
    rows = noise(20, WIDTH)
    rows[0] *= 1e4
    rows[1] = -rows[0]
    plain = decompose(prepare(rows, "v", center=True, normalise_rows=False))
    equal = decompose(prepare(rows, "v", center=True, normalise_rows=True))
    assert plain.shares[0] > 0.99
    assert equal.shares[0] < 0.3


def concepts(n: int = 5) -> Matrix:
    return noise(n, WIDTH) + 4.0 * noise(1, WIDTH, seed=9)  # a dominant common component


@pytest.mark.parametrize("k", [4, 5, 6])
def test_a_k_that_makes_all_vectors_the_same_is_refused(k: int) -> None:
    with pytest.raises(
        InputError, match=r"rank 4, and removing k >= 4 of them makes all cleaned vectors the same; k <= 3"
    ):
        from_concepts(concepts(), k)


def test_the_largest_k_that_is_allowed_keeps_vectors_apart() -> None:
    found = from_concepts(concepts(), 3)
    cleaned = np.stack([remove(one, found.basis) for one in concepts()])
    assert found.degeneracy == ""
    assert pairwise_cosines(cleaned).min() < 0.9999


@pytest.mark.parametrize("k", [None, 4, 5])
def test_the_published_k_says_what_it_does(k: int | None) -> None:
    found = from_concepts(concepts(), k, published=True)
    cleaned = np.stack([remove(one, found.basis) for one in concepts()])
    assert pairwise_cosines(cleaned).min() == pytest.approx(1.0, abs=1e-9)
    assert "all of them steer alike" in found.degeneracy
    assert ("1 of them arbitrary" in found.degeneracy) == (k != 4)


def test_rounding_noise_is_not_called_a_direction() -> None:
    rows = noise(4, WIDTH)
    rows -= rows.mean(axis=0)  # no common component: nothing is left at k = n - 1
    assert "rounding noise" in from_concepts(rows, 3, published=True).degeneracy


def test_two_vectors_are_too_few() -> None:
    with pytest.raises(InputError, match="from 2 vectors: at least 3 are needed, because k <= n - 2"):
        from_concepts(concepts(2))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_permutation_test_finds_the_planted_rank(rank: int) -> None:
    states, axes = planted(80, rank) if rank else (noise(80, WIDTH), np.zeros((0, WIDTH)))
    found = from_neutral(states, permutations=39)
    assert found.k == rank
    assert len(found.p_values) == rank + 1 and found.p_values[-1] > 0.05
    if rank:
        captured = np.linalg.norm(found.basis @ axes.T) ** 2 / rank
        assert captured > 0.95


def test_false_alarms_of_the_permutation_test_are_as_many_as_its_level() -> None:
    alarms = sum(from_neutral(noise(24, 12, seed=seed), permutations=19).k > 0 for seed in range(40))
    assert alarms <= 7  # 5 % of 40 is 2; more than 7 happens once in 700


def test_neutral_states_bound_k() -> None:
    with pytest.raises(InputError, match="k=11 was given; with 80 states of rank 32, k from 1 to 10"):
        from_neutral(noise(80, WIDTH), 11)
    with pytest.raises(InputError, match="needs at least 19 permutations"):
        from_neutral(noise(80, WIDTH), permutations=5)
    assert from_neutral(noise(80, WIDTH), 2).k == 2


@pytest.mark.parametrize("rank", [1, 4])
def test_cross_validation_finds_the_planted_dimension(rank: int) -> None:
    assert choose_dimension(planted(100, rank)[0], "x") == rank


def test_noise_is_no_manifold() -> None:
    with pytest.raises(InputError, match="animal: cross-validation finds no direction that is more than noise"):
        task_manifold(noise(60, WIDTH), "animal")
    with pytest.raises(InputError, match="animal: 6 states cannot be split into 5 folds; 10 are needed"):
        task_manifold(noise(6, WIDTH), "animal")


def test_a_hard_manifold_is_a_projector_and_a_soft_one_shrinks() -> None:
    states, axes = planted(100, 3)
    vector = axes[0] + noise(WIDTH, seed=5)
    hard = task_manifold(states, "x", kind="hard")
    once = hard.project(vector)
    assert np.allclose(hard.project(once), once)
    assert hard.m == 3 and hard.ridge == 0
    soft = task_manifold(states, "x")
    assert 0.5 < soft.ridge < 2.0  # the planted noise has variance 1
    assert 0 < soft.weights.min() < 0.6 and soft.weights.max() > 0.9
    assert np.linalg.norm(soft.project(vector)) > np.linalg.norm(once)
    assert np.all(task_manifold(states, "x", ridge=100.0).weights < soft.weights)
    assert task_manifold(states, "x", kind="hard", m=1).m == 1


def test_impossible_manifolds_are_refused() -> None:
    states = planted(20, 2)[0]
    with pytest.raises(InputError, match="m=40 was given; with 20 states of rank 19"):
        task_manifold(states, "x", m=40)
    with pytest.raises(InputError, match="ridge"):
        task_manifold(states, "x", kind="hard", ridge=1.0)


def test_a_strong_direction_does_not_hide_a_weak_one() -> None:
    source = np.random.default_rng(0)
    axes = np.linalg.qr(source.normal(size=(WIDTH, 2)))[0].T
    sizes = np.array([60.0, 3.0])
    states = source.normal(size=(80, WIDTH)) + (source.normal(size=(80, 2)) * sizes) @ axes
    assert from_neutral(states, permutations=19).k == 2
