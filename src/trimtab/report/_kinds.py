"""Which results have a report of their own, and what renders it: one line per result."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from trimtab.results import Analysis, Comparison
from trimtab.results.commits import CommitWalk
from trimtab.results.evaluation import Evaluation
from trimtab.results.sae import SAERun
from trimtab.results.sae_evaluation import PrecisionReport, SAEEvaluation
from trimtab.results.stress import Stress
from trimtab.results.training import TRAINING_KINDS
from trimtab.results.triage import Triage
from trimtab.results.vectors import ExtractionReport
from trimtab.results.vectors_clean import Cleaning, VectorComparison
from trimtab.results.weights import WeightsAnalysis


class Kind(NamedTuple):
    """A result with a report; functions are "module:name" in this package, imported when they are used."""

    result: type
    text: str
    html: str


KINDS: dict[str, Kind] = {
    "analysis": Kind(Analysis, "_text:render_analysis", "_html:render_analysis"),
    "comparison": Kind(Comparison, "_text:render_comparison", "_html:render_comparison"),
    "triage": Kind(Triage, "_triage_text:render_triage", "_html:render_triage"),
    "commits": Kind(CommitWalk, "_commits_text:render", "_html:render_commits"),
    "vector_comparison": Kind(VectorComparison, "_text_other:render", "_vectors:render"),
    "evaluation": Kind(Evaluation, "_evaluation:render_text", "_evaluation:render"),
    "stress": Kind(Stress, "_stress:render_text", "_stress:render"),
    "extraction": Kind(ExtractionReport, "_made:render", "_made:render_html"),
    "cleaning": Kind(Cleaning, "_made:render", "_made:render_html"),
    "sae_run": Kind(SAERun, "_made:render", "_made:render_html"),
    "sae_evaluation": Kind(SAEEvaluation, "_sae:render_text", "_sae:render"),
    "precision_report": Kind(PrecisionReport, "_precision:render_text", "_precision:render"),
    "weights": Kind(WeightsAnalysis, "_weights:render_text", "_weights:render"),
    **{kind: Kind(result, "_training:render", "_training:render_html") for kind, result in TRAINING_KINDS.items()},
}
"""By the `kind` that their JSON documents give; a comparison gives none."""


def renderer(result: object, form: Literal["text", "html"]) -> Callable[..., str] | None:
    """Return what renders a result; None when it has no report of its own."""
    for kind in KINDS.values():
        if isinstance(result, kind.result):
            module, name = getattr(kind, form).split(":")
            found: Callable[..., str] = getattr(importlib.import_module(f"trimtab.report.{module}"), name)
            return found
    return None


def kind_of(document: Any) -> type | None:
    """Return the result that a JSON document holds; a comparison is known by its two-sided ledger."""
    if not isinstance(document, dict):
        return None
    named = KINDS.get(str(document.get("kind")))
    if named is not None:
        return named.result
    return Comparison if {"ledger", "records", "verdict"} <= set(document) else None
