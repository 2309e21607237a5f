"""What a training of sparse autoencoders did: its steps as lines, its warnings, and the run as a whole.

All figures are in unscaled, interpretable units: activations with a mean squared length of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SAE_RUN_VERSION = 1  # 1: first version
SAE_STEP_VERSION = 1  # 1: first version


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEStepLine:
    """One SAE after one step."""

    format_version: int = SAE_STEP_VERSION
    kind: str = "sae_step"
    sae: str
    step: int
    """1-based."""
    tokens: int
    """Trained on so far."""
    loss: float
    """What was minimised, before the step."""
    recon: float
    """Mean squared error per token."""
    l0: float
    """Mean number of active latents per token."""
    l0_share: float
    """Of all latents."""
    sparsity: float
    """The penalty, with its coefficient."""
    aux: float
    """Auxiliary losses, with their coefficients."""
    grad_norm: float
    """Before it was clipped."""
    lr: float
    coefficient: float
    """Of the sparsity."""
    dead: float
    """Share of the latents that have not fired for the number of tokens that makes one dead."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """With evaluations: norm and mean of parameters and gradients, quantiles of the log10 density."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """With `log_timing`: seconds of this step, by what was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SAECheck:
    """One SAE on the held-out tokens."""

    sae: str
    step: int
    """Steps taken before it."""
    tokens: int
    """Held out."""
    fvu: float
    """Squared error over the squared distance from the mean of the held-out tokens; 0 is perfect."""
    l0: float
    dead: float
    """Share of the latents that fired on none of these tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEWarning:
    """A rule of the monitor that was broken; each is told once."""

    sae: str
    step: int
    rule: str
    level: str
    """"flag" or "warn"."""
    metric: str
    value: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedSAE:
    """One SAE of a run."""

    name: str
    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    site: str
    target: str
    """Another site than `site` makes a transcoder."""
    dtype: str
    """Of storage."""
    compute: str
    """Of the matrix products."""
    config: Mapping[str, Any]
    last: SAEStepLine | None
    """The last step that was logged."""
    checks: tuple[SAECheck, ...]
    path: str
    """Directory of `cfg.json` and `sae_weights.safetensors`."""
    monitor: tuple[str, ...]
    """Names of the rules that were asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SAERun:
    """What a training of one or several SAEs on one stream did."""

    format_version: int = SAE_RUN_VERSION
    kind: str = "sae_run"
    path: str
    passed: bool
    """False when a strict run was stopped by a red flag."""
    reason: str
    steps: int
    """Taken."""
    total_steps: int
    """Of the schedule."""
    stopped: str
    """"finished", "early_exit" or "flag"."""
    tokens: int
    batch_size: int
    saes: tuple[TrainedSAE, ...]
    warnings: tuple[SAEWarning, ...]
    data: Mapping[str, Any]
    """Source, filters, what they left out, and the measured scale."""
    seconds: float
    """Of all sessions together, without loading."""
    tokens_per_second: float
    peak_memory: int
    """Bytes of the process, or of the accelerator."""
    deterministic: bool
    processes: int
    resumed: int
    """How often it went on from a checkpoint."""
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
