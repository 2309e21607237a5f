"""What a pass keeps, against arithmetic on all the rows at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from trimtab.vectors.extract import controls, evidence
from trimtab.vectors.extract.sums import Needs, Sketches, Sums

Floats = np.ndarray[Any, np.dtype[np.float64]]
WIDTH = 6


def rows(count: int, *, offset: float = 0.0, seed: int = 0) -> tuple[Floats, Floats]:
    """Rows of two labels in turn, correlated, and their labels (0 is positive)."""
    source = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    mixing = source.standard_normal((WIDTH, WIDTH))
    values = source.standard_normal((count, WIDTH)) @ mixing + offset
    values[labels == 0] += np.arange(WIDTH)
    return values.astype(np.float32).astype(np.float64), labels


def summed(values: Floats, labels: Floats, needs: Needs, *, batch: int = 7, draws: int = 4) -> Sums:
    sums = Sums(WIDTH, needs, torch.device("cpu"))
    weights = controls.weights(torch.from_numpy(labels), draws, 0)
    for start in range(0, len(values), batch):
        part = slice(start, start + batch)
        sums.add(torch.from_numpy(values[part]).float(), torch.from_numpy(labels[part]), weights[part])
    sums.flush()
    return sums


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("batch", [1, 7, 500])
def test_means_and_scatter_are_those_of_all_rows(offset: float, batch: int) -> None:
    """With an offset of 1e5, sums of squares minus squares of sums would keep no digit of float32 rows."""
    values, labels = rows(500, offset=offset)
    sums = summed(values, labels, Needs(scatter=True), batch=batch)
    parts = [values[labels == label] for label in (0, 1)]
    np.testing.assert_allclose(sums.means, np.stack([part.mean(axis=0) for part in parts]), rtol=1e-12)
    expected = sum((part - part.mean(axis=0)).T @ (part - part.mean(axis=0)) for part in parts)
    np.testing.assert_allclose(sums.scatter, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    assert sums.counts == [250, 250]


def test_differences_of_pairs() -> None:
    values, labels = rows(200)
    sums = summed(values, labels, Needs(pairs=True, sample=50), batch=8)
    differences = values[0::2] - values[1::2]
    np.testing.assert_allclose(sums.second, differences.T @ differences, rtol=1e-12)
    assert (sums.pairs, sums.seen, sums.kept) == (100, 100, 50)
    known = {tuple(row) for row in differences.astype(np.float32).tolist()}
    assert all(tuple(row) in known for row in sums.sample.tolist())


def test_the_sample_is_even_over_all_rows() -> None:
    """A sample of the first rows would follow the order of the data; here each tenth of the stream has its share."""
    found = np.zeros(10)
    for seed in range(40):
        sums = Sums(1, Needs(sample=20), torch.device("cpu"), seed=seed)
        for number in range(200):
            sums.add(torch.tensor([[float(number)]]), torch.tensor([0]), torch.zeros(1, 2, dtype=torch.float64))
        sums.flush()
        assert len(set(sums.sample[:, 0].tolist())) == 20
        found += np.histogram(sums.sample[:, 0].numpy(), bins=10, range=(0, 200))[0]
    assert found.sum() == 800 and found.min() > 50 and found.max() < 115  # 80 +- 4 standard deviations of 8.5


def test_memory_does_not_grow_with_the_rows() -> None:
    def held(count: int) -> int:
        sums = summed(*rows(count), Needs(scatter=True, pairs=True, sample=20), batch=16)
        tensors = [one for one in vars(sums).values() if isinstance(one, torch.Tensor)]
        return sum(one.numel() * one.element_size() for one in tensors) + len(sums._waiting)

    assert held(320) == held(3200)
    sketches = Sketches(2)
    for _ in range(60):
        sketches.add(torch.rand(2, 4096))
        assert sketches._held < 1 << 17
    assert sketches.quantiles(0, (0.5,))[0] == pytest.approx(0.5, rel=0.02)


def test_covariance_controls_have_the_covariance_within_the_labels() -> None:
    values, labels = rows(400)
    sums = summed(values, labels, Needs(scatter=True), draws=4000)
    assert sums.combined is not None and sums.weights is not None
    centred = (sums.combined - sums.weights[..., None] * sums.means)[:4000].sum(dim=1).numpy()
    drawn = centred.T @ centred / 4000
    expected = sums.scatter.numpy()  # type: ignore[union-attr]
    assert np.linalg.norm(drawn - expected) < 0.08 * np.linalg.norm(expected)  # about sqrt(2 / 4000) by entry


def test_shuffled_controls_are_differences_of_means() -> None:
    values, labels = rows(60)
    labels = (np.arange(60) % 3 == 0).astype(np.int64)
    weights = controls.weights(torch.from_numpy(labels), 3, 0).numpy()[:, 3:]
    for column in weights.T:
        chosen = column > 0
        assert chosen.sum() == (labels == 0).sum() and not np.array_equal(chosen, labels == 0)
        expected = values[chosen].mean(axis=0) - values[~chosen].mean(axis=0)
        np.testing.assert_allclose(column @ values, expected)


def test_auc_is_scikit_learn_s_with_ties() -> None:
    source = np.random.default_rng(0)
    scores, positive = source.integers(0, 9, 200).astype(float), source.random(200) < 0.3
    assert evidence.auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


def test_separation_of_constant_scores_is_no_nan() -> None:
    same = np.ones(4)
    assert evidence.separation(same, same) == 0.0
    assert evidence.separation(same + 1, same) == np.inf
    assert evidence.separation(same - 1, same) == -np.inf
