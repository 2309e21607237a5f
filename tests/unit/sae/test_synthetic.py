"""Sparse dictionaries are what they say, and autoencoders find their features."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from trimtab.errors import RecipeError
from trimtab.sae import Learner, OptimConfig, SAEConfig, SparseDictionary, recovery


def test_rows_have_mean_squared_length_one_and_so_many_features() -> None:
    dictionary = SparseDictionary(mean_active=8.0, zipf=1.0)
    x, codes = dictionary.draw(20_000, torch.Generator().manual_seed(1))
    assert float(x.square().sum(1).mean()) == pytest.approx(1.0, rel=0.02)
    assert float((codes > 0).sum(1).double().mean()) == pytest.approx(8.0, rel=0.02)
    assert torch.allclose(x, codes @ dictionary.features, atol=1e-6)
    assert torch.allclose(dictionary.features.norm(dim=1), torch.ones(256), atol=1e-6)
    seen = (codes > 0).double().mean(0)
    assert torch.allclose(seen, dictionary.frequencies, atol=0.02)
    falling = dictionary.frequencies[dictionary.frequencies < 0.5]
    ratio = falling[0] / falling[9]
    first = 256 - len(falling) + 1
    assert float(ratio) == pytest.approx((first + 9) / first)


def test_samples_are_numbered_and_seeded() -> None:
    one, other = SparseDictionary(32, 8, mean_active=2), SparseDictionary(32, 8, mean_active=2, seed=1)
    assert one.sample(5, index=3).equal(SparseDictionary(32, 8, mean_active=2).sample(5, index=3))
    assert not one.sample(5, index=3).equal(one.sample(5, index=4))
    assert not one.sample(5).equal(other.sample(5))
    assert [x.tolist() for x in islice(one.batches(5, first=2), 2)] == [one.sample(5, index=n).tolist() for n in (2, 3)]
    assert one.about() == {"num_features": 32, "d": 8, "zipf": 1.0, "mean_active": 2, "seed": 0}
    with pytest.raises(RecipeError, match="mean_active is 20; above 0 and at most 16"):
        SparseDictionary(32, 8, mean_active=20)


def test_recovery_counts_features_that_a_row_points_along() -> None:
    features = torch.eye(4)
    rows = torch.stack([features[0] * 7, -features[1], features[2] + 0.3 * features[3]])
    assert recovery(rows, features) == 0.5  # the first, and the third at cosine 0.958
    assert recovery(rows, features, cosine=0.97) == 0.25


FOUND: dict[str, dict[str, Any]] = {
    "jumprelu": {"bandwidth": 0.05, "threshold": 0.02},
    "batchtopk": {"k": 8, "dead_tokens": 20_000},
}


def found(architecture: str, *, steps: int, batch: int) -> float:
    dictionary = SparseDictionary(num_features=256, d=64, zipf=1.0, mean_active=8.0)
    target = 8.0 if architecture == "jumprelu" else None
    made = Learner(
        SAEConfig(d_in=64, d_sae=512, architecture=architecture, **FOUND[architecture]),
        optim=OptimConfig(lr=3e-3, warmup=50, target_l0=target),
        total_steps=steps,
    )
    for number in range(steps):
        made.step(dictionary.sample(batch, index=number))
    return recovery(made.parameters_unscaled()["W_dec"], dictionary.features)


@pytest.mark.parametrize("architecture", FOUND)
def test_features_are_recovered(architecture: str) -> None:
    assert found(architecture, steps=400, batch=512) >= 0.9


@pytest.mark.full
@pytest.mark.parametrize("architecture", FOUND)
def test_features_are_recovered_whatever_the_size_of_the_batch(architecture: str) -> None:
    assert found(architecture, steps=2000, batch=2048) >= 0.95
