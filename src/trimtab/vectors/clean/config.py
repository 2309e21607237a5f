"""CleanConfig: every setting of a cleaning, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from trimtab.errors import RecipeError
from trimtab.results.vectors_clean import CleanMethod
from trimtab.vectors.clean.manifold import Kind

Source = Literal["neutral", "concepts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """What is removed from vectors, and what is kept."""

    method: CleanMethod = "contamination"
    """Remove a contamination subspace, project on the task manifold, or both in this order (dual)."""
    source: Source = "neutral"
    """What contamination is estimated from: states of neutral texts, or the vectors themselves."""
    k: int | None = None
    """Directions to remove; None: by permutation test (neutral), 1 (concepts), or all of them (published)."""
    max_loss: float = 0.05
    """When the test chooses k and data were given: stop before a direction that costs a vector more of its accuracy."""
    normalise_rows: bool | None = None
    """Divide every centred row by its norm; None: for concepts, not for neutral states."""
    published: bool = False
    """Allow k >= n - 1 for concepts, as published, which makes all cleaned vectors the same."""
    permutations: int = 99
    """Of the test."""
    alpha: float = 0.05
    """Of the test."""
    manifold: Kind = "ridge"
    """Shrink directions that the concept's states hardly use, or cut all but m of them (hard)."""
    m: int | None = None
    """Directions of the manifold; None: by cross-validation."""
    ridge: float | None = None
    """Variance at which the soft manifold halves a direction; None: the noise variance at m."""
    blend: float = 0.0
    """Share of the vector before the manifold that is kept: 0 is the projection alone, 1 no projection."""
    seed: int = 0
    """Of the permutations, the folds, and the split of the data."""

    def __post_init__(self) -> None:
        for name, choices in (("method", CleanMethod), ("source", Source), ("manifold", Kind)):
            if getattr(self, name) not in get_args(choices):
                raise RecipeError(
                    f"{name} is {getattr(self, name)!r}; one of {', '.join(get_args(choices))} was expected"
                )
        if not (math.isfinite(self.blend) and 0 <= self.blend <= 1):
            raise RecipeError(f"blend is {self.blend}; a share from 0 to 1 was expected")
        idle = [
            (self.published and self.source != "concepts", "published", "source='concepts'"),
            (self.method == "manifold" and self.k is not None, "k", "method='contamination' or 'dual'"),
            (not self.has_manifold and self.m is not None, "m", "method='manifold' or 'dual'"),
            (not self.has_manifold and self.ridge is not None, "ridge", "method='manifold' or 'dual'"),
            (not self.has_manifold and self.blend > 0, "blend", "method='manifold' or 'dual'"),
            (self.manifold == "hard" and self.ridge is not None, "ridge", "manifold='ridge'"),
        ]
        for is_idle, name, needs in idle:
            if is_idle:
                raise RecipeError(f"{name}={getattr(self, name)} changes nothing here: it needs {needs}")

    @property
    def has_manifold(self) -> bool:
        """Whether vectors are projected on the task manifold."""
        return self.method != "contamination"

    @property
    def has_contamination(self) -> bool:
        """Whether a contamination subspace is removed."""
        return self.method != "manifold"
