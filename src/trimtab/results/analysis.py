"""What a precision sweep shows: token agreement, drift, cap deltas, and one sentence of advice."""

from __future__ import annotations

from dataclasses import dataclass, field

ANALYSIS_VERSION = 1  # 1: first version
SIGNIFICANT_DRIFT = 0.9  # a token match ratio under this is flagged
CLAMPING_OPS = ("Cap", "CapSubspace")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigRow:
    """One configuration of a sweep, summed over its prompts."""

    label: str
    backend: str
    model_dtype: str
    op_math: str
    """Arithmetic dtype of the ops: "float32", "bfloat16", "float16", or "model"; "none" without ops."""
    is_reference: bool
    num_prompts: int
    identical_prompts: int
    """Prompts whose generated tokens all equal the reference's."""
    match_ratio: float
    """Equal tokens at equal places over reference tokens, all prompts together; 1: all reference tokens matched."""
    significant_drift: bool
    first_divergence: int | None
    """Smallest generated-token index at which any prompt differs; None when none does."""
    rel_l2_mean: float | None
    rel_l2_max: float | None
    """Teacher-forced drift, over every compared row of every layer; None for the reference."""
    mae_mean: float | None
    mae_max: float | None
    clamp_rate: float | None
    """Clamped rows over the rows that a cap selected, teacher-forced, of the last prompt token and on; None: no cap."""
    cap_delta_rms: float | None
    """Root mean square of cap_delta over the same rows, those that were not clamped (0) included."""
    tokens_per_second: float | None
    """Generated tokens of the free pass, all prompts, over its wall time: prefill and writing the trace included,
    loading not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptInfo:
    """One prompt of the sweep."""

    index: int
    text: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenAgreement:
    """Free-running tokens of one configuration and prompt against the reference's."""

    config: str
    prompt: int
    reference_tokens: tuple[str, ...]
    tokens: tuple[str, ...]
    reference_ids: tuple[int, ...]
    ids: tuple[int, ...]
    match_ratio: float
    """Equal tokens at equal places over reference tokens."""
    first_divergence: int | None
    length_delta: int
    significant_drift: bool
    reference_margin: float | None
    """Reference log-probability of its top-1 minus its top-2 token at the first divergence, in nats."""
    smallest_margin: float | None
    """Smallest such margin over the steps up to and including the divergence (all steps when there is none)."""
    drift_before: float | None
    """Teacher-forced rel_l2 of the last layer's row that predicts the first diverging token."""
    explanation: str
    """One sentence: how the divergence relates to the drift and to the margin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftCell:
    """Teacher-forced difference of one row (config, prompt, step, layer) from the reference's row."""

    config: str
    prompt: int
    step: int
    """Generated-token index that the row predicts; 0 is the last prompt row."""
    position: int
    layer: int
    mae: float
    band: str
    """"<0.01", "0.01-0.1", "0.1-1" or ">1"; ">1" also where the error is not finite."""
    rmse: float
    rel_l2: float
    cosine: float
    max_ulp: int | None
    """Largest distance in representable steps of the coarser dtype; None when not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CapStep:
    """What the ops did at one site and step, teacher-forced along the reference's tokens."""

    config: str
    prompt: int
    step: int
    site: str
    op: str
    projection_before: float
    projection_after: float
    cap_delta: float
    """What the op's bounds or target ask of the projection: clamp(p) - p for a cap, in hidden units, signed; 0 where
    nothing was clamped, and for ops without such a target."""
    cap_delta_norm: float
    """|cap_delta|: the length of the correction along the unit direction."""
    clamped: bool
    reference_cap_delta: float | None

    @property
    def can_clamp(self) -> bool:
        """Whether the op has bounds, so that the row counts in a clamp rate."""
        return self.op.partition(":")[2] in CLAMPING_OPS


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobStep:
    """Top-k log-probabilities of one step against the reference's, teacher-forced."""

    config: str
    prompt: int
    step: int
    reference_top: str
    top: str
    same_top: bool
    shared: int
    """How many of the reference's top-k tokens are in the candidate's top-k."""
    num_top: int
    delta_top: float
    """Candidate minus reference log-probability of the reference's top-1 token, in nats."""
    max_delta: float
    """Largest absolute difference over the shared tokens, in nats."""
    reference_margin: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """One sentence with its evidence."""

    sentence: str
    question: str
    metric: str
    baseline: str
    """The configuration that is compared against, such as "bf16"."""
    alternative: str
    """The configuration that might be better, such as "bf16_cap_fp32"."""
    estimate: float
    """Mean paired difference, alternative minus baseline, of `metric`."""
    low: float
    high: float
    confidence: float
    num_pairs: int
    measurable: bool
    """False when the interval holds 0: no measurable difference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisLedger:
    """What was expected, compared and left out; anything short is named in `problems`."""

    expected_rows: int
    compared_rows: int
    expected_prompts: int
    compared_prompts: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """A sweep, or two runs, read against one reference configuration."""

    format_version: int = ANALYSIS_VERSION
    kind: str = "analysis"
    passed: bool
    reason: str
    title: str
    model: str
    run: str
    steering: str
    """The steering in words, such as "Cap at layers.4.resid_post, max 5.0, positions generated"."""
    steering_digest: str
    reference: str
    configs: tuple[ConfigRow, ...]
    prompts: tuple[PromptInfo, ...]
    agreements: tuple[TokenAgreement, ...]
    drift: tuple[DriftCell, ...]
    cap_steps: tuple[CapStep, ...]
    logprobs: tuple[LogprobStep, ...]
    recommendation: Recommendation | None
    ledger: AnalysisLedger
    num_layers: int
    command: str
    environment: dict[str, str] = field(default_factory=dict)
    created: str = ""
    """ISO 8601, UTC."""
    next_command: str = ""
    """Where to look next, as a command line."""
