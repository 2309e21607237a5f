"""What an evaluation of steering found: rollouts, scores per variant, side effects, dose-response, and the choice."""

from __future__ import annotations

from dataclasses import dataclass

ROLLOUTS_VERSION = 1  # 1: first version
EVALUATION_VERSION = 1  # 1: first version


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantState:
    """One variant of a rollout run and how far it is."""

    name: str
    group: str
    """Variants of one vector at several scales share it; the dose-response is read within a group."""
    scale: float | None
    """Strength in `unit`; None where there is no dose."""
    unit: str
    steering: str
    """The steering in words; empty: none."""
    steering_digest: str
    system: str
    """The system prompt of the variant; empty: none of its own."""
    expected: int
    done: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRun:
    """Variants x prompts x samples, in one resumable directory."""

    format_version: int = ROLLOUTS_VERSION
    kind: str = "rollouts"
    path: str
    model: str
    backend: str
    dtype: str
    seed: int
    samples: int
    num_prompts: int
    max_tokens: int
    temperature: float
    variants: tuple[VariantState, ...]
    tokens: int
    """Generated so far."""
    seconds: float
    """Spent generating so far, over all attempts."""
    finished: bool
    next_command: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """The values of one scorer over the outputs of one variant."""

    variant: str
    scorer: str
    count: int
    """Outputs that have a value."""
    mean: float
    """NaN when there is none."""
    std: float
    """Of single outputs (n - 1); NaN below two."""
    low: float
    """Lower end of the 95 % interval of the mean; prompts are resampled, since outputs of one are not independent."""
    high: float
    refusals: int
    missing: int
    """Outputs without a value for any other reason."""
    reasons: tuple[str, ...] = ()
    """Why values are missing, the most frequent first, at most three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SideEffects:
    """What a variant does to the text besides what it is for."""

    variant: str
    count: int
    perplexity: float
    """Median over outputs, of the continuation under the unsteered model; NaN when it was not measured."""
    perplexity_ratio: float
    """`perplexity` over that of the unsteered outputs; NaN likewise."""
    distinct_1: float
    """Different tokens over tokens, mean over outputs."""
    distinct_2: float
    repetition_4: float
    """Share of 4-grams that occurred before in the output, mean over outputs."""
    loops: float
    """Share of outputs that end in a degenerate loop."""
    refusal_rate: float
    coherent: float
    """Share of outputs that are long enough, not repetitive, and not improbable; NaN without perplexities."""
    tokens: float
    """Mean length of the continuations."""
    kl: float
    """Mean KL(steered || unsteered) of the next token along the unsteered continuations, in nats; NaN likewise."""
    retention: float
    """Perplexity of the retention texts, steered over unsteered; NaN without such texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DosePoint:
    """The mean score at one strength."""

    scale: float
    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DoseResponse:
    """How a score moves with the strength, within one group of variants."""

    group: str
    scorer: str
    unit: str
    points: tuple[DosePoint, ...]
    slope: float
    """Least squares over single outputs: score per unit of strength."""
    slope_low: float
    slope_high: float
    spearman: float
    """Rank correlation of strength and score over single outputs; 0 with a reason when undefined."""
    reason: str
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParetoPoint:
    """Effect against damage of one variant."""

    variant: str
    scorer: str
    effect: float
    """Mean score minus that of the unsteered outputs."""
    damage: float
    """Perplexity ratio."""
    efficient: bool
    """No other variant has as much effect for as little damage, and more of one or less of the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitHalf:
    """The strength chosen on one half of the prompts and scored on the other, many times over."""

    group: str
    scorer: str
    chosen: float
    """The strength chosen most often."""
    stability: float
    """Share of the splits that chose it."""
    selected: float
    """Mean gain over unsteered on the halves that chose: too high by construction."""
    held_out: float
    """Mean gain over unsteered on the halves that did not: the figure to believe."""
    low: float
    """2.5 % quantile of the held-out gain over splits."""
    high: float
    splits: int
    undecided: int
    """Splits in which no strength kept within the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoPoint:
    """What one strength costs."""

    scale: float
    kl: float
    """Mean over prompts of the KL(steered || unsteered) of the next token, in nats."""
    perplexity_ratio: float
    """Perplexity of the unsteered continuations under the steered model over that under the unsteered one."""
    within: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoCoefficient:
    """The largest strength whose damage stays within a budget."""

    format_version: int = EVALUATION_VERSION
    kind: str = "auto_coefficient"
    metric: str
    """"perplexity" (a ratio) or "kl" (nats)."""
    budget: float
    scale: float
    """The chosen strength; 0 when none keeps within the budget."""
    reason: str
    points: tuple[AutoPoint, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierReport:
    """How good a classifier is on questions that it has never seen."""

    name: str
    train: int
    held_out: int
    questions: int
    """Different questions among the held-out ones."""
    accuracy: float
    f1: float
    auc: float
    auc_low: float
    """Lower end of the 95 % interval; questions are resampled."""
    auc_high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One output, to read beside the figures."""

    variant: str
    question: str
    """What was asked, without any system prompt."""
    text: str
    """The continuation, cut after 400 signs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Scores, side effects and statistics of a rollout run."""

    format_version: int = EVALUATION_VERSION
    kind: str = "evaluation"
    passed: bool
    """Every scorer gave a value to some output."""
    reason: str
    path: str
    model: str
    scorers: tuple[str, ...]
    count: int
    """Outputs."""
    summaries: tuple[ScoreSummary, ...]
    effects: tuple[SideEffects, ...] = ()
    dose_responses: tuple[DoseResponse, ...] = ()
    pareto: tuple[ParetoPoint, ...] = ()
    split_half: tuple[SplitHalf, ...] = ()
    classifiers: tuple[ClassifierReport, ...] = ()
    examples: tuple[Example, ...] = ()
    """The first output of every variant to each of the first two prompts: chosen before anything was scored."""
    finished: bool = True
    warnings: tuple[str, ...] = ()
