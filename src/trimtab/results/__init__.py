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

__all__ = [
    "Analysis",
    "AnalysisLedger",
    "CapStep",
    "ConfigRow",
    "DriftCell",
    "LogprobStep",
    "PromptInfo",
    "Recommendation",
    "TokenAgreement",
    "from_json",
    "schema",
    "to_dict",
    "to_json",
]
