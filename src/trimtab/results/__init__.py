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

__all__ = [
    "Analysis",
    "AnalysisLedger",
    "CapStep",
    "ConfigRow",
    "DecodeComparison",
    "DecodeStep",
    "DoctorReport",
    "DoseSummary",
    "DriftCell",
    "Finding",
    "GeneratedText",
    "GenerationRun",
    "LogprobStep",
    "PromptInfo",
    "Recommendation",
    "SweepConfigState",
    "SweepRun",
    "TokenAgreement",
    "from_json",
    "schema",
    "to_dict",
    "to_json",
]
