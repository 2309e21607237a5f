"""What the scaling test of steering vectors found: effect, coherence and cost at every sample size, and the knee."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

STRESS_VERSION = 1  # 1: first version

KneeStatus = Literal["found", "above the largest", "undecided"]
StressMethod = Literal[
    "mean_difference",
    "contrastive",
    "raw",
    "pca",
    "logistic",
    "mass_mean",
    "lda",
    "contamination",
    "manifold",
    "dual",
    "trained",
]
"""`contrastive` is another name of `mean_difference`; `raw` is the mean of the positive states, without any contrast;
`contamination`, `manifold` and `dual` clean the mean difference; `trained` is BiPO on the pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effectiveness:
    """How well strength moves two scorers, over single outputs."""

    se: float
    """`0.5 (spearman(delta, strength) + spearman(judge, strength)) x coherence`; -1 to 1, 0 is no effect."""
    published: float
    """`0.5 (spearman(delta, strength) + pearson(delta, judge)) x coherence`: for comparison only. Its second term says
    whether two scorers agree, so that it is far from 0 without any effect."""
    rho_delta: float
    """Spearman's rank correlation of delta and strength."""
    rho_judge: float
    coherence: float
    """Share of coherent outputs."""
    n: int
    """Outputs."""
    judged: int
    """Outputs that the judge gave a value."""
    slope: float
    """Of delta on strength, least squares."""
    reasons: tuple[str, ...] = ()
    """Why a correlation is given as 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StressPoint:
    """One attribute, method and sample size."""

    attribute: str
    method: str
    size: int
    """Examples of each label that the vector was made from."""
    effectiveness: Effectiveness
    f1: float
    """Of the vector as a classifier on held-out texts; its threshold is set on the training texts."""
    extract_seconds: float
    generate_seconds: float
    """Wall time of the steered outputs."""
    tokens_per_second: float
    ram_bytes: int
    """Peak resident memory of the process so far; it never falls."""
    vram_bytes: int
    """Peak memory of the accelerator in this step; 0 without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StrengthPoint:
    """Means over the outputs of one attribute, method, size and strength."""

    attribute: str
    method: str
    size: int
    strength: float
    delta: float
    judge: float
    """NaN when the judge gave no value."""
    coherence: float
    perplexity: float
    """Median, of the continuation under the unsteered model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What doubling a sample size adds to se, mean over the attributes."""

    size: int
    double: int
    gain: float
    low: float
    high: float
    """Of a paired bootstrap over prompts and seeds."""
    half_width: float
    seeds: int
    """Seeds that were drawn for it."""
    decided: bool
    """Whether the half-width is as narrow as asked for, or the lower bound is above the gain that counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Knee:
    """The sample size from which doubling adds nothing that counts."""

    status: KneeStatus
    size: int | None
    gains: tuple[Gain, ...]
    scan: int | None
    """The first size whose gain is below the bound, by a plain scan of the estimates; noise stops it early."""
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodCurve:
    """One method: its sizes, its knee."""

    method: str
    sizes: tuple[int, ...]
    se: tuple[float, ...]
    """Mean over the attributes."""
    f1: tuple[float, ...]
    knee: Knee


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomBand:
    """se of random directions of equal strength, for one attribute."""

    attribute: str
    directions: int
    mean: float
    p95: float
    p99: float
    highest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StressPlan:
    """What was asked for."""

    model: str
    model_digest: str
    dtype: str
    attributes: tuple[str, ...]
    methods: tuple[str, ...]
    sizes: tuple[int, ...]
    strengths: tuple[float, ...]
    prompts: tuple[str, ...]
    seeds: int
    max_seeds: int
    max_tokens: int
    temperature: float
    sites: tuple[str, ...]
    pool: str
    unit: str
    scale: float
    controls: int
    seed: int
    label_noise: float
    delta: str
    """What gives delta."""
    judge: str
    """What judges, on other evidence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stress:
    """The whole test."""

    format_version: int = STRESS_VERSION
    kind: str = "stress"
    path: str
    created: str
    plan: StressPlan
    points: tuple[StressPoint, ...]
    strengths: tuple[StrengthPoint, ...]
    curves: tuple[MethodCurve, ...]
    controls: tuple[RandomBand, ...]
    conclusion: str
    outputs: int
    seconds: float
    """Wall time of all steps, interruptions left out."""
    notes: tuple[str, ...] = field(default=())
