"""Results as streams: one small document per line (`--jsonl`), each complete in itself and versioned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trimtab.results.analysis import (
    Analysis,
    AnalysisLedger,
    CapStep,
    DriftCell,
    LogprobStep,
    PromptInfo,
    TokenAgreement,
)
from trimtab.results.commits import CommitLedger, CommitOutcome
from trimtab.results.comparison import Comparison, Ledger, RecordVerdict
from trimtab.results.runs import GeneratedText

LINES_VERSION = 1  # 1: first version


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedLine:
    """One prompt and what the model wrote after it, as soon as it is finished."""

    format_version: int = LINES_VERSION
    kind: str = "generated"
    prompt_index: int
    """0-based, in the order in which prompts were given."""
    model: str
    backend: str
    dtype: str
    steering: str
    """In words."""
    steering_digest: str
    generated: GeneratedText
    trace: str | None = None
    """Directory of the trace, when one is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedLine:
    """One matched pair of a comparison."""

    format_version: int = LINES_VERSION
    kind: str = "compared"
    reference: str
    candidate: str
    record: RecordVerdict


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyzedLine:
    """One prompt in one configuration of a sweep."""

    format_version: int = LINES_VERSION
    kind: str = "analyzed"
    run: str
    config: str
    reference: str
    prompt: PromptInfo
    agreement: TokenAgreement | None
    """None for the reference itself."""
    drift: tuple[DriftCell, ...]
    cap_steps: tuple[CapStep, ...]
    logprobs: tuple[LogprobStep, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitLine:
    """One commit of a walk, as soon as its runs are judged."""

    format_version: int = LINES_VERSION
    kind: str = "commit"
    revisions: str
    outcome: CommitOutcome


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictLine:
    """The last line of a comparison, an analysis or a walk over commits."""

    format_version: int = LINES_VERSION
    kind: str = "verdict"
    of: Literal["comparison", "analysis", "commits"]
    passed: bool
    reason: str
    ledger: Ledger | AnalysisLedger | CommitLedger


def lines(result: Comparison | Analysis) -> Iterator[ComparedLine | AnalyzedLine | VerdictLine]:
    """Yield a result line by line: its pairs, or its prompts by configuration; the verdict last."""
    if isinstance(result, Comparison):
        for record in result.records:
            yield ComparedLine(reference=result.reference, candidate=result.candidate, record=record)
        yield VerdictLine(of="comparison", passed=result.passed, reason=result.reason, ledger=result.ledger)
        return
    for row in result.configs:
        for prompt in result.prompts:
            yield _analyzed(result, row.label, prompt)
    yield VerdictLine(of="analysis", passed=result.passed, reason=result.reason, ledger=result.ledger)


def _analyzed(result: Analysis, config: str, prompt: PromptInfo) -> AnalyzedLine:
    where = (config, prompt.index)
    return AnalyzedLine(
        run=result.run,
        config=config,
        reference=result.reference,
        prompt=prompt,
        agreement=next((one for one in result.agreements if (one.config, one.prompt) == where), None),
        drift=tuple(one for one in result.drift if (one.config, one.prompt) == where),
        cap_steps=tuple(one for one in result.cap_steps if (one.config, one.prompt) == where),
        logprobs=tuple(one for one in result.logprobs if (one.config, one.prompt) == where),
    )
