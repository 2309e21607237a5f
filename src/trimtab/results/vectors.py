"""What extracting steering vectors found: the evidence of every site, held out from what made the vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

EXTRACTION_VERSION = 1  # 1: first version


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleCount:
    """How much data one part of an extraction had."""

    positive: int
    negative: int
    questions: int
    tokens: int
    """Tokens that were pooled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteEvidence:
    """One site's vector and what it separates; None where there were no held-out examples."""

    site: str
    norm: float
    """Length of the vector in hidden units: the distance of the two labels' means along it."""
    median_norm: float
    """Median length of the pooled tokens' states."""
    cosine_to_mean_difference: float
    """-1 to 1; 1 for the method mean_difference itself."""
    note: str = ""
    """What the method says of itself, such as the votes for a sign."""
    auc: float | None = None
    """Share of (positive, negative) held-out pairs that the projection on the vector orders rightly; 0.5 is chance."""
    accuracy: float | None = None
    """Of the threshold halfway between the training means; both labels weigh the same."""
    separation: float | None = None
    """Distance of the held-out means along the vector, in standard deviations."""
    random_auc: float | None = None
    """95th percentile over random directions of max(auc, 1 - auc)."""
    covariance_auc: float | None = None
    """The same over random directions with the covariance of the states within a label."""
    shuffled_auc: float | None = None
    """The same over differences of means under shuffled labels."""
    effect: float | None = None
    """Half of what adding the unit direction with both signs, at 0.1 of each token's norm, moves the difference of the
    two labels' mean log-probabilities on held-out examples, in nats per token; above 0 it steers towards its label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionReport:
    """What `vectors.extract` found, without the vectors."""

    format_version: int = EXTRACTION_VERSION
    kind: str = "extraction"
    path: str = ""
    """Directory of the vector files; empty when they were not written."""
    model: str
    model_digest: str
    model_dtype: str
    data: str
    data_digest: str
    method: str
    pool: str
    train: ExampleCount
    validation: ExampleCount | None
    sites: tuple[SiteEvidence, ...]
    best: str | None
    """The chosen site; None without held-out examples and with many sites."""
    chosen_by: Literal["steering", "auc", ""] = ""
    """"steering": the highest effect of those of the held-out examples; "auc": the highest auc, then separation."""
    pass_seconds: float
    """Wall time of the pass over the training examples."""
    notes: tuple[str, ...] = field(default=())
