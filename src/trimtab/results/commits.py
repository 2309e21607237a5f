"""What a commit-by-commit test found: runs, metrics, red flags, the first bad commit, and a ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

COMMITS_VERSION = 1  # 1: first version

Risk = Literal["LOW", "MEDIUM", "HIGH"]
RunStatus = Literal["ok", "failed", "timeout", "setup"]
CommitStatus = Literal["passed", "flagged", "failed", "untested"]
Mode = Literal["walk", "bisect", "plan"]
FlagKind = Literal[
    "error", "nonfinite", "bound", "range", "pattern", "check", "diverged", "changed", "missing", "expected"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskReason:
    """One change of a commit that has a bearing on numbers, or plainly has none."""

    risk: Risk
    file: str
    line: int
    """1-based line of the new file (of the old one for what was removed); 0 for a file without an AST."""
    what: str
    """What changed, in a few words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricTrack:
    """One scalar over the steps of one run; at most 400 points, the first, last, extreme and non-finite ones kept."""

    metric: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    count: int
    """Points that were read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandRun:
    """One command, run once in the worktree of a commit."""

    command: str
    """Its name in the plan."""
    argv: str
    """What was run, placeholders filled in."""
    steps: int
    seed: int
    status: RunStatus
    exit_code: int | None
    seconds: float
    detail: str
    """One line: why it did not end well; empty when it did."""
    directory: str
    """Where its output is, relative to the walk's directory."""
    trace: str
    """Its trace, relative to the walk's directory; empty when it wrote none."""
    kept: bool
    """Whether an earlier walk had run it already."""
    metrics: tuple[MetricTrack, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RedFlag:
    """A rule or check that does not hold at a commit."""

    kind: FlagKind
    rule: str
    """The rule in words."""
    command: str
    text: str
    """What was found, in one sentence."""
    metric: str = ""
    step: int | None = None
    value: float | None = None
    excused: bool = False
    """Whether the plan expected it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricChange:
    """How far one metric moved from an earlier commit, on the steps that both have."""

    command: str
    metric: str
    against: str
    steps: int
    """Steps compared."""
    max_abs: float
    max_rel: float
    """Largest |a - b| / max(|b|, 1e-2 rms of b)."""
    at_step: int | None
    noise: float | None
    """The same as `max_abs` between two runs of the base; None when it was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceChange:
    """How the trace of a command compares with that of an earlier commit."""

    command: str
    against: str
    passed: bool
    pairs: int
    identical: int
    failing: int
    first: str
    """The first divergence; empty when there is none."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitOutcome:
    """One commit: what it is, what was run, what was found."""

    commit: str
    subject: str
    author: str
    date: str
    position: int
    """0 is the base, then the commits in their order."""
    status: CommitStatus
    risk: Risk
    risk_source: Literal["diff", "plan"]
    risk_reasons: tuple[RiskReason, ...]
    steps: int
    intention: str = ""
    notes: str = ""
    summary: str = ""
    """One line: what is wrong, or that nothing is."""
    runs: tuple[CommandRun, ...] = ()
    flags: tuple[RedFlag, ...] = ()
    metric_changes: tuple[MetricChange, ...] = ()
    trace_changes: tuple[TraceChange, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BisectStep:
    """One decision of a bisection."""

    commit: str
    verdict: Literal["good", "bad", "untestable"]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitLedger:
    """What was to be tested and what was; the base counts."""

    expected: int
    tested: int
    kept: int
    """Of the tested ones, those whose runs an earlier walk had already made."""
    untested: tuple[str, ...] = ()
    """Commit and reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitWalk:
    """The commits of a range, tested one by one."""

    format_version: int = COMMITS_VERSION
    kind: str = "commits"
    passed: bool
    reason: str
    finished: bool
    """False when nothing was run: a plan was proposed only."""
    mode: Mode
    revisions: str
    repository: str
    base: str
    head: str
    directory: str
    plan: str
    """The plan in use, as a file to edit."""
    seed: int
    first_bad: str | None
    """The first commit that is flagged or fails; None when there is none."""
    commits: tuple[CommitOutcome, ...]
    ledger: CommitLedger
    rules: tuple[str, ...] = ()
    """The rules that every commit is held to, in words."""
    bisection: tuple[BisectStep, ...] = ()
    warnings: tuple[str, ...] = ()
    next_command: str = ""
    """What to run next."""
