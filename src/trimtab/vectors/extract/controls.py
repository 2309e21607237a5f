"""Control directions of a site: random, random with the states' covariance, and from shuffled labels.

The last two are sums of the rows under random weights, so they need no covariance and no second pass: with independent
normal weights `sum_i e_i (x_i - m_label(i))` has the covariance within the labels (times n) as its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.vectors.extract.sums import Sums

KINDS = ("random", "covariance", "shuffled")


@dataclass(frozen=True, kw_only=True, slots=True)
class Directions:
    """A site's vector and its controls."""

    vector: Tensor
    """float64 [D]."""
    matrix: Tensor
    """float32 [1 + controls, D]: unit directions, the vector's first, then those of each kind."""
    threshold: float
    """Projection halfway between the training means."""
    cosine: float
    """With the difference of means."""
    note: str

    @property
    def unit(self) -> Tensor:
        """The vector's unit direction, float32 [D]."""
        return self.matrix[0]

    def first_controls(self) -> dict[str, Tensor]:
        """One control of each kind, as long as the vector."""
        each = (len(self.matrix) - 1) // len(KINDS)
        length = float(self.vector.norm())
        return {kind: self.matrix[1 + place * each].double() * length for place, kind in enumerate(KINDS) if each}


def weights(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return the weights of every example in the controls, float64 [N, 2 * count]: normal ones, then shuffled labels.

    A shuffled label weighs `1 / n_positive` or `-1 / n_negative`, so that the sum is a difference of means.
    """
    source = np.random.default_rng(seed)
    plain = labels.numpy()
    sizes = np.array([1 / max(int((plain == 0).sum()), 1), -1 / max(int((plain == 1).sum()), 1)])
    shuffled = [sizes[source.permutation(plain)] for _ in range(count)]
    normal = source.standard_normal((len(plain), count))
    return torch.from_numpy(np.column_stack([normal, *shuffled]))


def directions(vector: Tensor, sums: Sums, note: str, count: int, seed: int) -> Directions:
    """Return a site's directions; `vector` float64 [D] on the CPU."""
    drawn = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((count, len(vector))))
    assert sums.combined is not None and sums.weights is not None, "nothing was added"
    summed, total, means = sums.combined.cpu(), sums.weights.cpu(), sums.means.cpu()
    centred = summed - total[..., None] * means
    parts = [vector[None], drawn, centred[:count].sum(dim=1), summed[count:].sum(dim=1)]
    threshold = float(means.mean(dim=0) @ (vector / vector.norm()))
    cosine = float(torch.cosine_similarity(vector, sums.difference.cpu(), dim=0))
    rows = torch.cat(parts)
    units = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return Directions(vector=vector, matrix=units.float(), threshold=threshold, cosine=cosine, note=note)
