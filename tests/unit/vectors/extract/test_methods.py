"""Each method against another implementation of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from trimtab.vectors.extract import controls
from trimtab.vectors.extract.methods import METHODS, fit_logistic, scaled
from trimtab.vectors.extract.sums import Sums

Floats = np.ndarray[Any, np.dtype[np.float64]]
WIDTH = 12


def data(count: int = 120, *, flip: bool = False) -> tuple[Floats, Floats]:
    source = np.random.default_rng(3)
    labels = np.arange(count) % 2
    values = source.standard_normal((count, WIDTH)) * np.linspace(0.3, 3, WIDTH)
    values[labels == int(flip)] += np.linspace(1, -0.5, WIDTH)
    return values.astype(np.float32).astype(np.float64), labels


def solved(name: str, values: Floats, labels: Floats) -> tuple[Floats, str]:
    method = METHODS[name]
    sums = Sums(WIDTH, method.needs, torch.device("cpu"))
    sums.add(
        torch.from_numpy(values).float(), torch.from_numpy(labels), controls.weights(torch.from_numpy(labels), 1, 0)
    )
    sums.flush()
    found = method.solve(sums)
    return scaled(found.direction, sums.difference).numpy(), found.note


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("name", METHODS)
def test_swapped_labels_turn_the_vector_round(name: str) -> None:
    """The axis of a principal component has no sign of its own."""
    values, labels = data()
    there, _ = solved(name, values, labels)
    swapped = values.reshape(-1, 2, WIDTH)[:, ::-1].reshape(-1, WIDTH)
    back, _ = solved(name, swapped, labels)
    np.testing.assert_allclose(back, -there, rtol=1e-6, atol=1e-8)
    difference = values[labels == 0].mean(axis=0) - values[labels == 1].mean(axis=0)
    assert there @ difference > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_vector_is_as_long_as_the_means_are_apart_along_it(name: str) -> None:
    values, labels = data()
    vector, _ = solved(name, values, labels)
    along = values @ vector / np.linalg.norm(vector)
    assert np.linalg.norm(vector) == pytest.approx(along[labels == 0].mean() - along[labels == 1].mean(), rel=1e-6)


def test_pca_is_the_first_right_singular_vector_of_the_differences() -> None:
    values, labels = data()
    differences = values[0::2] - values[1::2]
    _, lengths, axes = np.linalg.svd(differences, full_matrices=False)
    found, note = solved("pca", values, labels)
    assert abs(cosine(found, axes[0])) == pytest.approx(1, abs=1e-9)
    votes = int((differences @ found > 0).sum())
    assert votes > 30 and note.startswith(f"{votes} of 60 pairs vote")
    assert f"{lengths[0] ** 2 / (lengths**2).sum():.1%}" in note


def test_most_pairs_decide_a_sign_not_the_longest() -> None:
    """One pair that is far off the other way outweighs the mean, and has one vote."""
    source = np.random.default_rng(0)
    differences = source.standard_normal((20, WIDTH)) * 0.01
    differences[:, 0] += np.where(np.arange(20) == 0, -100.0, 1.0)
    values = np.empty((40, WIDTH))
    values[0::2], values[1::2] = differences, 0.0
    found, note = solved("pca", values, np.arange(40) % 2)
    assert found[0] > 0 and note.startswith("19 of 20")


def test_logistic_is_scikit_learn_s() -> None:
    values, labels = data(90)
    values, labels = values[:-7:], labels[:-7:]
    keep = (labels == 0) | (np.arange(len(labels)) % 3 == 0)
    values, labels = values[keep], labels[keep]
    signs = np.where(labels == 0, 1.0, -1.0)
    centred = values - values.mean(axis=0)
    scale = np.sqrt((centred**2).mean())
    reference = LogisticRegression(C=1.0, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(
        centred / scale, signs
    )
    weights, intercept = fit_logistic(values, signs)
    np.testing.assert_allclose(weights * scale, reference.coef_[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        values @ weights + intercept, reference.decision_function(centred / scale), rtol=1e-3, atol=1e-3
    )


def test_lda_is_scikit_learn_s_with_the_same_shrinkage() -> None:
    values, labels = data(40)
    found, note = solved("lda", values, labels)
    centred = np.concatenate([values[labels == label] - values[labels == label].mean(axis=0) for label in (0, 1)])
    share = float(note.split()[1])
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share).fit(values, labels == 0)
    assert cosine(found, reference.coef_[0]) > 0.9999
    # theirs leaves out the terms in 1/p and counts n, not n - 2
    assert share == pytest.approx(OAS(assume_centered=True).fit(centred).shrinkage_, abs=0.02)


def test_mass_mean_is_the_whitened_difference() -> None:
    values, labels = data()
    parts = [values[labels == label] for label in (0, 1)]
    covariance = sum((part - part.mean(axis=0)).T @ (part - part.mean(axis=0)) for part in parts) / (len(values) - 2)
    loaded = covariance + 1e-3 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    expected = np.linalg.solve(loaded, parts[0].mean(axis=0) - parts[1].mean(axis=0))
    assert cosine(solved("mass_mean", values, labels)[0], expected) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", ["mass_mean", "lda"])
def test_fewer_examples_than_dimensions_still_give_a_direction(name: str) -> None:
    vector, _ = solved(name, *data(6))
    assert np.isfinite(vector).all() and np.linalg.norm(vector) > 0
