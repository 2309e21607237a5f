"""What cleaning and comparing steering vectors found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CLEANING_VERSION = 1  # 1: first version
VECTOR_COMPARISON_VERSION = 1  # 1: first version

CleanMethod = Literal["contamination", "manifold", "dual"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanedVector:
    """One vector before and after."""

    name: str
    site: str
    path: str
    """Where the cleaned vector is; empty when it was not written."""
    norm: float
    """In hidden units; the cleaned vector has the norm of the raw one."""
    kept: float
    """Norm of what cleaning left, as a share of the raw norm, before it was scaled back."""
    cosine: float
    """Of the cleaned with the raw direction."""
    m: int | None
    """Directions of its task manifold; None when there is none."""
    ridge: float | None
    """Variance at which the manifold halves a direction; 0 for a hard projector, None without a manifold."""
    accuracy_before: float | None
    """Balanced accuracy on held-out questions, 0.5 is chance; None when no data were given."""
    accuracy_after: float | None
    n_held_out: int
    """Held-out texts that the accuracies are of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanedSite:
    """What was removed at one site."""

    site: str
    source: Literal["neutral", "concepts", "none"]
    n: int
    """States or vectors that the subspace was estimated from."""
    k: int
    """Directions removed."""
    share: float
    """Share of their variance in these directions."""
    p_values: tuple[float, ...]
    """Of the permutation test, direction by direction; empty when k was given."""
    route: str
    """Decomposition that ended: gesdd, gesvd or eigh."""
    cosine_before: float | None
    """Smallest cosine of two raw vectors of this site; None for a single one."""
    cosine_after: float | None
    """Smallest cosine of two cleaned ones."""
    degeneracy: str
    """What the published setting does to the result; empty when nothing is wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaning:
    """Vectors cleaned of what they share for other reasons, and what became of them."""

    format_version: int = CLEANING_VERSION
    kind: str = "cleaning"
    method: CleanMethod
    model: str
    blend: float
    """Share of the contamination-free vector that was kept beside the manifold's projection."""
    seed: int
    directory: str
    sites: tuple[CleanedSite, ...]
    vectors: tuple[CleanedVector, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorFacts:
    """What a vector file says of itself."""

    name: str
    path: str
    method: str
    """How it was made: "trained", "mean_difference", ...; empty when the file does not say."""
    site: str
    width: int
    norm: float
    median_norm: float | None
    """Median norm of the states at its site."""
    validation_loss: float | None
    baseline_loss: float | None
    """Loss of the unsteered model on the same tokens."""
    prompted_loss: float | None
    """Loss of the prompted model on the same tokens."""
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorPair:
    """Two vectors side by side."""

    a: str
    b: str
    cosine: float
    z: float
    """`cosine * sqrt(d)`: standard deviations from 0, were the directions random."""
    norm_ratio: float
    """|a| / |b|."""
    same_site: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorComparison:
    """Vectors compared pair by pair."""

    format_version: int = VECTOR_COMPARISON_VERSION
    kind: str = "vector_comparison"
    vectors: tuple[VectorFacts, ...]
    pairs: tuple[VectorPair, ...]
    """Every pair of one set, or each vector with those of the other set."""
    against: tuple[str, ...] = ()
    """Names of the second set; empty for one set."""
    matched: tuple[VectorPair, ...] = ()
    """Pairs of one name, one from each set."""
    directory: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorListing:
    """What a vector file holds."""

    kind: str = "vector_listing"
    path: str
    form: str
    """Kind of file."""
    site: str
    width: int
    norm: float
    largest: float
    """Largest absolute element of the vector, in hidden units."""
    median_norm: float | None
    digest: str
    model_digest: str
    data_hash: str
    quantiles: tuple[tuple[float, float], ...]
    recipe: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, str], ...]
