"""What a triage found: the module that made the first difference, why it is thought so, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.results.comparison import Fingerprint, RecordKey

TRIAGE_VERSION = 1  # 1: first version

Origin = Literal["module", "between", "weights", "parameter_gradient", "optimizer", "inputs", "value", "tensor"]
Direction = Literal["forward", "backward", "update"]
Severity = Literal["none", "equivalent", "minor", "significant", "severe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleCall:
    """One call of a module in both runs: how much larger its output's error is than what came in."""

    module_path: str
    module_class: str
    layer: int | None
    direction: Direction
    phase: str
    step: int
    micro_step: int
    rank: int | None
    call_index: int
    order: int
    """The reference's running number of the first output."""
    input_error: float | None
    """Largest relative error (rel_l2) of the inputs; None when no input was recorded and nothing ran before."""
    output_error: float
    expected: float
    """Relative error that rounding explains; amplification is measured against at least this."""
    amplification: float
    """Output error over max(input error, expected), of all rows or of the worst row, whichever is larger."""
    status: str
    """made: inputs agree, an output does not; contains: a module inside made it; carried: an input differs; agrees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Rows of a tensor that carry the error."""

    rows: int
    total: int
    text: str
    """In words: ranges of tokens per sequence, or of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The first trustworthy divergence: the place that made the error."""

    key: RecordKey
    """The first wrong tensor that this place made."""
    direction: Direction
    origin: Origin
    module_path: str
    """The module that made the error, "" is the model, or what stands outside of modules."""
    module_class: str
    layer: int | None
    sentence: str
    input_error: float | None
    output_error: float
    expected: float
    amplification: float
    after: str
    """The last tensor before it that agrees."""
    first_shown: str
    """The first tensor that fails; another one than `key` when the error was made before it was large enough."""
    ranks: tuple[int, ...]
    """Ranks on which this tensor differs, and those on which it agrees."""
    ranks_agreeing: tuple[int, ...]
    where: RowRange | None
    fingerprints: tuple[Fingerprint, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RuledOut:
    """A cause that the evidence excludes."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestDifference:
    """A setting in which the two runs differ."""

    group: Literal["precision", "optimizer", "environment", "versions", "arguments", "code", "run"]
    key: str
    reference: str
    candidate: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatches:
    """Which micro-batches diverge, and what they share."""

    diverging: tuple[str, ...]
    agreeing: tuple[str, ...]
    shared: tuple[str, ...]
    """What all diverging ones have and no agreeing one has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspicion:
    """A change in the source that belongs to a known kind of mistake."""

    kind: str
    line: int
    """In the new file, or in the old one when the line is gone."""
    side: Literal["removed", "added"]
    code: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Hunk:
    """One hunk of the difference between two commits."""

    file: str
    old_start: int
    old_lines: int
    new_start: int
    new_lines: int
    text: str
    distance: int
    """Lines between the hunk and the suspect's code; 0 inside of it."""
    suspicions: tuple[Suspicion, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """Who last changed lines of the suspect."""

    commit: str
    date: str
    summary: str
    lines: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReference:
    """Where the suspect's code is and how it changed."""

    file: str
    line: int | None
    end: int | None
    name: str
    """Class or function."""
    found_by: Literal["record", "dump call", "source map"]
    revision: str
    """The range of commits whose difference is shown; empty when none is known."""
    hunks: tuple[Hunk, ...] = ()
    """Of this file, nearest first."""
    elsewhere: tuple[Hunk, ...] = ()
    """Of other files, the most suspicious first."""
    blame: tuple[Blame, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Follower:
    """A tensor behind a transplant, before and after it."""

    tensor: str
    before: float
    """Its relative error in the candidate as it is."""
    after: float
    status: str
    """Its verdict after the transplant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transplanted:
    """What happened when the suspect's tensor was replaced by the reference's."""

    site: str
    agrees: bool
    reason: str
    followers: tuple[Follower, ...] = ()
    left_out: int = 0
    """Tensors behind it that were not looked at: beyond the first 2,000, or not passed by this run."""
    reproduced: bool = True
    """Whether the run without a transplant showed the difference."""
    alike: tuple[str, ...] = ()
    """The same tensor of other modules of that class, which share its code: replaced as well for the rest to agree."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fix:
    """A patch that takes the most suspicious change back."""

    file: str
    patch: str
    """A unified diff against the newer revision."""
    proved: bool
    """Whether a transplant showed that nothing else is wrong behind the suspect."""
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatCell:
    """Largest error of one kind of tensor in one layer."""

    direction: Direction
    layer: str
    tensor: str
    error: float
    status: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStrip:
    """Errors by row of one tensor near the divergence."""

    tensor: str
    errors: tuple[float, ...]
    """Relative row errors; thinned to the largest of equal runs of rows when there are many."""
    rows_per_cell: int
    expected: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Triage:
    """The first trustworthy divergence of two runs, with its evidence."""

    format_version: int = TRIAGE_VERSION
    kind: Literal["triage"] = "triage"
    passed: bool
    """Whether nothing diverges and everything was compared."""
    reason: str
    reference: str
    candidate: str
    verdict: str
    divergence: Divergence | None = None
    severity: Severity = "none"
    likely_cause: str = ""
    next_check: str = ""
    calls: tuple[ModuleCall, ...] = ()
    """Module calls in causal order, around and before the divergence."""
    calls_left_out: int = 0
    ruled_out: tuple[RuledOut, ...] = ()
    manifest: tuple[ManifestDifference, ...] = ()
    micro_batches: MicroBatches | None = None
    notes: tuple[str, ...] = ()
    """Sequence lengths, routing, and what could not be looked at."""
    source: SourceReference | None = None
    transplant: Transplanted | None = None
    fix: Fix | None = None
    heat: tuple[HeatCell, ...] = ()
    strips: tuple[TokenStrip, ...] = ()
    pairs: int = 0
    failing: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 nothing diverges, 1 something does."""
        return 0 if self.passed else 1
