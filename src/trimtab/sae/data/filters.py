"""What is left out of training, and the scale of what is left: measured once, on the first rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import InputError, RecipeError

_BLOCK = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """Rows that are left out. All of them are counted, and stated in the manifest."""

    special: bool = True
    """Tokens that begin or pad a text, as the source knows them: their state is the same in every text, and many times
    as long."""
    tokens: tuple[int, ...] = ()
    """More token ids."""
    max_norm: float | None = 10.0
    """Rows longer than so many times the median length, at any site; None keeps them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if self.max_norm is not None and not (math.isfinite(self.max_norm) and self.max_norm > 1):
            raise RecipeError(f"max_norm is {self.max_norm}; a finite number above 1, or None, was expected")

    def kept_tokens(self, ids: Tensor, special: frozenset[int]) -> Tensor | None:
        """Return which rows remain by their token, bool [rows]; None: all."""
        listed = [*self.tokens, *(sorted(special) if self.special else ())]
        return None if not listed else ~torch.isin(ids, torch.tensor(listed))


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteMeasure:
    """What the first rows of a site say of its scale."""

    rows: int
    norm: float
    """Square root of the mean squared length: activations are divided by it before training."""
    median_norm: float
    limit: float
    """Longer rows are left out; infinity when none are."""
    centre_share: float
    """Squared length of the mean over the mean squared length: 0 for centred activations."""


def measure(values: Mapping[str, Tensor], filters: Filters, name: str) -> dict[str, SiteMeasure]:
    """Measure the first rows, after tokens were filtered.

    Args:
        values: site -> [rows, width].
        filters: which outliers are left out.
        name: the source, for messages.

    Returns:
        Site -> its measure; sums in float64, over the rows that remain.

    Raises:
        InputError: no row, or a site whose rows are all the same.
    """
    norms = {site: lengths(one) for site, one in values.items()}
    found: dict[str, tuple[float, float]] = {}
    for site, one in norms.items():
        if not len(one):
            raise InputError(f"{name}: no activation is left at {site}; relax the filters, or give more data")
        median = float(one.median())
        found[site] = (median, math.inf if filters.max_norm is None or not median else filters.max_norm * median)
    kept = kept_norms(norms, {site: limit for site, (_, limit) in found.items()})
    measures = {}
    for site, one in values.items():
        rows = one if kept is None else one[kept]
        mean, square = _moments(rows)
        if bool((rows == rows[0]).all()):
            raise InputError(
                f"{name}: all {len(rows)} activations of {site} are the same vector (length {square**0.5:.4g}); an "
                "autoencoder learns nothing from a constant: check the site and the capture"
            )
        measures[site] = SiteMeasure(
            rows=len(rows),
            norm=math.sqrt(square),
            median_norm=found[site][0],
            limit=found[site][1],
            centre_share=float(mean.square().sum()) / square,
        )
    return measures


def lengths(values: Tensor) -> Tensor:
    """Return the length of each row, float32 [rows], in blocks so that no second copy of the whole is made."""
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=-1) for part in torch.split(values, _BLOCK)])


def kept_norms(norms: Mapping[str, Tensor], limits: Mapping[str, float]) -> Tensor | None:
    """Return which rows are within the limit at every site, bool [rows]; None: all."""
    kept = None
    for site, one in norms.items():
        if limits[site] < math.inf:
            inside = one <= limits[site]
            kept = inside if kept is None else kept & inside
    return None if kept is None or bool(kept.all()) else kept


def _moments(values: Tensor) -> tuple[Tensor, float]:
    """Return the mean row (float64) and the mean squared length."""
    mean = torch.zeros(values.shape[1], dtype=torch.float64)
    square = 0.0
    for part in torch.split(values, _BLOCK):
        wide = part.double()
        mean += wide.sum(dim=0)
        square += float(wide.square().sum())
    return mean / len(values), square / len(values)
