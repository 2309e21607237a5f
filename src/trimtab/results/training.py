"""What trainings of steering vectors return: one training, a sweep of learning rates, a queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRAINING_VERSION = 1  # 1: first version


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStep:
    """One optimiser step."""

    step: int
    """1-based."""
    epoch: int
    """1-based."""
    loss: float
    """Mean over the target tokens (BiPO: pairs) of the step, before it was taken."""
    learning_rate: float
    grad_norm: float
    """Before it was limited."""
    norm: float
    """Of all vectors together, after the step."""
    grad_limited: bool = False
    norm_limited: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingEvaluation:
    """The validation after a step."""

    step: int
    epoch: float
    loss: float
    """Mean negative log-likelihood per target token (BiPO: per pair, mean of both signs)."""
    perplexity: float
    """Of the targets (BiPO: of the chosen answers)."""
    best: bool
    """Whether it was the best up to then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedMap:
    """What came out at one site."""

    site: str
    kind: str
    """"vector" or "low_rank"."""
    width: int
    norm: float
    """In hidden units; of a low-rank map the Frobenius norm of its write matrix."""
    digest: str
    """BLAKE2b-256 of the steering that holds this map alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCounts:
    """What entered, after cutting to the greatest length."""

    sequences: int
    tokens: int
    targets: int
    """Tokens that entered the loss in one epoch."""
    validation_sequences: int
    validation_targets: int
    test_sequences: int
    test_targets: int
    cut: int
    """Sequences that were shortened, all splits."""
    dropped: int
    """Items of which no target was left, all splits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexities:
    """Perplexity per target token of one split, by model."""

    unsteered: float
    steered: float
    prompted: float | None = None
    """Without the vector, under the prompt that it is to replace; None where the data has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What `train` returns besides the steering."""

    format_version: int = TRAINING_VERSION
    kind: str = "training"
    name: str
    """Of the data."""
    model: str
    model_digest: str
    hidden_size: int
    dtype: str
    """Of the model; what is trained is float32."""
    config: Mapping[str, Any]
    maps: tuple[TrainedMap, ...]
    steering_digest: str
    steps: tuple[TrainingStep, ...]
    evaluations: tuple[TrainingEvaluation, ...]
    best_step: int
    """The step that was restored; the last one where there was no validation."""
    best_loss: float | None
    unsteered_loss: float | None
    """Validation loss of the model as it is."""
    improved: bool | None
    """Whether the best is better than the unsteered model; None without validation."""
    stopped: str
    """"finished", "early", "max_steps" or "non-finite"."""
    validation: Perplexities | None
    test: Perplexities | None
    counts: TrainingCounts
    seconds: float
    """Of all sessions together, loading left out."""
    tokens_per_second: float
    """Tokens of training sequences, evaluations left out of neither side."""
    peak_memory: int
    """Bytes: of the accelerator, or of the process."""
    resumed: int
    """How often it went on from a checkpoint."""
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRow:
    """One training in a table."""

    name: str
    state: str
    """"done", "failed", "running" or "waiting"."""
    learning_rate: float | None = None
    best_step: int | None = None
    steps: int | None = None
    loss: float | None = None
    """Best validation loss."""
    unsteered: float | None = None
    """Perplexity on the validation."""
    steered: float | None = None
    prompted: float | None = None
    norm: float | None = None
    stopped: str = ""
    seconds: float | None = None
    path: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSweep:
    """What `sweep_lr` returns: one training per learning rate."""

    format_version: int = TRAINING_VERSION
    kind: str = "rate_sweep"
    name: str
    model: str
    rows: tuple[TrainingRow, ...]
    best_rate: float
    reason: str
    """Which figure it was chosen by."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SetEstimate:
    """What one set would cost."""

    name: str
    state: str
    sequences: int
    tokens: int
    """Of one epoch."""
    steps: int
    seconds: float
    error: str = ""
    """Why the set cannot be trained; empty when it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueEstimate:
    """What `train_all` would do: nothing was trained."""

    format_version: int = TRAINING_VERSION
    kind: str = "queue_estimate"
    folder: str
    model: str
    sets: tuple[SetEstimate, ...]
    tokens: int
    """Of all epochs of all sets that are left."""
    seconds: float
    """On one worker, from a timed step; an upper bound, since early stopping is not foreseen."""
    memory: int
    """Bytes at the peak of the timed step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueRun:
    """What `train_all` returns: a directory and one row per set."""

    format_version: int = TRAINING_VERSION
    kind: str = "training_queue"
    path: str
    folder: str
    model: str
    rows: tuple[TrainingRow, ...]
    finished: bool
    """Whether every set is done; a failed one is not."""
    workers: int
    seconds: float
    next_command: str = ""


TRAINING_KINDS: Mapping[str, type[Any]] = {
    "training": Training,
    "rate_sweep": RateSweep,
    "training_queue": QueueRun,
    "queue_estimate": QueueEstimate,
}
"""What `kind` in a JSON document stands for."""


def row_of(training: Training, path: str = "") -> TrainingRow:
    """Return a training as a row."""
    validation = training.validation
    return TrainingRow(
        name=training.name,
        state="done",
        learning_rate=float(training.config["learning_rate"]),
        best_step=training.best_step,
        steps=len(training.steps),
        loss=training.best_loss,
        unsteered=None if validation is None else validation.unsteered,
        steered=None if validation is None else validation.steered,
        prompted=None if validation is None else validation.prompted,
        norm=sum(one.norm**2 for one in training.maps) ** 0.5,
        stopped=training.stopped,
        seconds=training.seconds,
        path=path,
    )
