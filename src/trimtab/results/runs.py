"""What the commands return besides an analysis: generated texts, sweeps, step tables, the state of an installation."""

from __future__ import annotations

from dataclasses import dataclass, field

RUNS_VERSION = 1  # 1: first version


@dataclass(frozen=True, kw_only=True, slots=True)
class DoseSummary:
    """What one op did during one request, summed over its rows."""

    site: str
    op: str
    rows: int
    clamped: int | None
    """Rows at a bound. This and the figures below are None where rows were counted only: without a trace."""
    mean_projection_before: float | None
    mean_projection_after: float | None
    max_ratio: float | None
    """Largest |correction| / |hidden state|."""
    reason: str = ""
    """Why no row was touched; empty when rows > 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedText:
    """One prompt and what the model wrote after it."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    stop: str
    """"eos", "length" or "forced"."""
    mean_logprob: float | None
    doses: tuple[DoseSummary, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRun:
    """What `generate` returns."""

    format_version: int = RUNS_VERSION
    kind: str = "generation"
    model: str
    backend: str
    dtype: str
    steering: str
    steering_digest: str
    texts: tuple[GeneratedText, ...]
    trace: str | None = None
    """Directory of the trace, when one was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfigState:
    """One configuration of a sweep on disk."""

    label: str
    backend: str
    model_dtype: str
    op_math: str
    free: str
    """"done", "partial" or "absent": the free-running pass."""
    forced: str
    """The same for the teacher-forced pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRun:
    """What `sweep` returns: a directory and what it holds."""

    format_version: int = RUNS_VERSION
    kind: str = "sweep"
    path: str
    model: str
    reference: str
    steering: str
    steering_digest: str
    num_prompts: int
    max_tokens: int
    configs: tuple[SweepConfigState, ...]
    finished: bool
    next_command: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeStep:
    """One decode step of `debug_decode`, both sides fed the same tokens."""

    step: int
    position: int
    reference_token: str
    token: str
    same_token: bool
    """Whether both sides prefer the same next token."""
    reference_margin: float | None
    max_abs_before: float
    mean_abs_before: float
    rmse_before: float
    max_abs_after: float
    mean_abs_after: float
    rmse_after: float
    rel_l2_after: float
    max_ulp_after: int | None
    cap_delta: float
    """Sum over the ops of the site, signed, in hidden units; NaN where none acted."""
    reference_cap_delta: float
    clamped: bool
    """Whether any op of the site was at a bound."""
    reference_clamped: bool
    delta_top_logprob: float
    max_delta_logprob: float
    shared_top: int
    num_top: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeComparison:
    """The step table of one prompt in two precisions."""

    format_version: int = RUNS_VERSION
    kind: str = "debug_decode"
    passed: bool
    """Whether free-running generation gave the same tokens on both sides."""
    reason: str
    model: str
    prompt: str
    site: str
    steering: str
    label: str
    reference_label: str
    text: str
    reference_text: str
    match_ratio: float
    first_divergence: int | None
    steps: tuple[DecodeStep, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that `doctor` looked at."""

    name: str
    state: str
    """"ok", "missing", "broken" or "untested"."""
    detail: str
    mend: str = ""
    """The command that mends it; empty when nothing is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorReport:
    """What is installed, what works, what is untested on this machine."""

    format_version: int = RUNS_VERSION
    kind: str = "doctor"
    passed: bool
    findings: tuple[Finding, ...]
    environment: dict[str, str] = field(default_factory=dict)
