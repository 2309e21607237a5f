"""Every result as a frozen dataclass with its JSON schema; imports no torch."""

from __future__ import annotations

from trimtab.results._io import from_json, schema, to_dict, to_json
from trimtab.results.analysis import (
    Analysis,
    AnalysisLedger,
    CapStep,
    ConfigRow,
    DriftCell,
    LogprobStep,
    PromptInfo,
    Recommendation,
    TokenAgreement,
)
from trimtab.results.commits import CommitWalk
from trimtab.results.comparison import (
    Calibration,
    Comparison,
    Fingerprint,
    FirstDivergence,
    Ledger,
    LedgerEntry,
    LedgerGroup,
    Metrics,
    RecordKey,
    RecordVerdict,
    RowSeries,
    SideCount,
    TokenDivergence,
)
from trimtab.results.evaluation import AutoCoefficient, Evaluation, RolloutRun
from trimtab.results.lines import AnalyzedLine, CommitLine, ComparedLine, GeneratedLine, VerdictLine, lines
from trimtab.results.runs import (
    DecodeComparison,
    DecodeStep,
    DoctorReport,
    DoseSummary,
    Finding,
    GeneratedText,
    GenerationRun,
    SweepConfigState,
    SweepRun,
)
from trimtab.results.sae import SAERun, SAEStepLine
from trimtab.results.sae_evaluation import PrecisionReport, SAEEvaluation, SAEExport
from trimtab.results.stress import Stress
from trimtab.results.training import QueueEstimate, QueueRun, RateSweep, Training
from trimtab.results.triage import Triage
from trimtab.results.vectors import ExtractionReport
from trimtab.results.vectors_clean import Cleaning, VectorComparison
from trimtab.results.weights import WeightsAnalysis

__all__ = [
    "Analysis",
    "AnalysisLedger",
    "AnalyzedLine",
    "AutoCoefficient",
    "Calibration",
    "CapStep",
    "Cleaning",
    "CommitLine",
    "CommitWalk",
    "ComparedLine",
    "Comparison",
    "ConfigRow",
    "DecodeComparison",
    "DecodeStep",
    "DoctorReport",
    "DoseSummary",
    "DriftCell",
    "Evaluation",
    "ExtractionReport",
    "Finding",
    "Fingerprint",
    "FirstDivergence",
    "GeneratedLine",
    "GeneratedText",
    "GenerationRun",
    "Ledger",
    "LedgerEntry",
    "LedgerGroup",
    "LogprobStep",
    "Metrics",
    "PrecisionReport",
    "PromptInfo",
    "QueueEstimate",
    "QueueRun",
    "RateSweep",
    "Recommendation",
    "RecordKey",
    "RecordVerdict",
    "RolloutRun",
    "RowSeries",
    "SAEEvaluation",
    "SAEExport",
    "SAERun",
    "SAEStepLine",
    "SideCount",
    "Stress",
    "SweepConfigState",
    "SweepRun",
    "TokenAgreement",
    "TokenDivergence",
    "Training",
    "Triage",
    "VectorComparison",
    "VerdictLine",
    "WeightsAnalysis",
    "from_json",
    "lines",
    "schema",
    "to_dict",
    "to_json",
]
