"""Sparse dictionaries with ground truth: activations whose features are known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import RecipeError


class SparseDictionary:
    """Activations that are sums of few known directions.

    Feature i fires with a probability that falls as `(i + 1) ** -zipf`, scaled so that `mean_active` fire on average
    (no probability passes 1/2), with a strength uniform in 1/2 to 3/2. Rows are divided by the root of their expected
    mean squared length: E|x|^2 = 1.

    Args:
        num_features: how many directions there are.
        d: width of the activations.
        zipf: exponent of the frequencies; 0: all equal.
        mean_active: features per row, on average.
        seed: of the directions and of every sample.

    Raises:
        RecipeError: when so many cannot be active.
    """

    def __init__(
        self, num_features: int = 256, d: int = 64, *, zipf: float = 1.0, mean_active: float = 8.0, seed: int = 0
    ) -> None:
        if not 0 < mean_active <= num_features / 2:
            raise RecipeError(f"mean_active is {mean_active:g}; above 0 and at most {num_features / 2:g} was expected")
        self.num_features, self.d, self.seed = num_features, d, seed
        self.zipf, self.mean_active = zipf, mean_active
        generator = torch.Generator().manual_seed(seed)
        raw = torch.randn(num_features, d, generator=generator, dtype=torch.float64)
        self.features: Tensor = (raw / raw.norm(dim=1, keepdim=True)).float()
        """[num_features, d] unit directions, float32."""
        self.frequencies: Tensor = _frequencies(num_features, zipf, mean_active)
        """[num_features] probabilities, float64."""
        gram = self.features.double() @ self.features.double().t()
        rates = self.frequencies
        crossed = torch.outer(rates, rates) * gram
        square = (rates * (1 + 1 / 12)).sum() + crossed.sum() - crossed.diagonal().sum()
        self.scale = float(square) ** -0.5
        """What rows are multiplied by, so that their mean squared length is 1."""

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return activations [batch, d] and the strengths [batch, num_features] that made them, float32."""
        fires = torch.rand(batch_size, self.num_features, generator=generator) < self.frequencies
        strength = torch.rand(batch_size, self.num_features, generator=generator) + 0.5
        codes = torch.where(fires, strength, 0) * self.scale
        return codes @ self.features, codes

    def sample(self, rows: int, *, index: int = 0) -> Tensor:
        """Return chunk number `index` of activations [rows, d], which no chunk before it is needed for."""
        seed = int.from_bytes(blake2b(f"{self.seed}:{index}".encode(), digest_size=7).digest(), "little")
        return self.draw(rows, torch.Generator().manual_seed(seed))[0]

    def batches(self, batch_size: int, *, first: int = 0) -> Iterator[Tensor]:
        """Yield batches [batch, d] for ever; each is the `sample` of its number."""
        for index in itertools.count(first):
            yield self.sample(batch_size, index=index)

    def about(self) -> dict[str, Any]:
        """Return what decides the activations."""
        return {
            "num_features": self.num_features,
            "d": self.d,
            "zipf": self.zipf,
            "mean_active": self.mean_active,
            "seed": self.seed,
        }


def _frequencies(count: int, zipf: float, mean_active: float) -> Tensor:
    weights = torch.arange(1, count + 1, dtype=torch.float64) ** -zipf
    low, high = 0.0, float(mean_active / weights[-1])
    for _ in range(200):  # bisection of a rising function
        middle = (low + high) / 2
        low, high = (middle, high) if float((weights * middle).clamp(max=0.5).sum()) < mean_active else (low, middle)
    return (weights * high).clamp(max=0.5)


def recovery(decoder: Tensor, features: Tensor, *, cosine: float = 0.9) -> float:
    """Return the share of true features that some latent's direction matches.

    Args:
        decoder: [d_sae, d] rows, of any length.
        features: [num_features, d] rows.
        cosine: what the largest cosine of a feature with the rows must pass.
    """
    rows, truth = decoder.double(), features.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    truth = truth / truth.norm(dim=1, keepdim=True)
    return float(((truth @ rows.t()).max(dim=1).values > cosine).double().mean())
