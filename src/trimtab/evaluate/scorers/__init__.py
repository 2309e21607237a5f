"""Scorers: each turns continuations into numbers, and says what it could not score."""

from __future__ import annotations

from trimtab.evaluate.scorers.base import Mark, Output, Scorer
from trimtab.evaluate.scorers.embedding import EmbeddingClassifier
from trimtab.evaluate.scorers.judge import Judge, JudgeConfig
from trimtab.evaluate.scorers.testbed import TestbedScorer
from trimtab.evaluate.scorers.vector import VectorScorer, projections, vector_classifier

__all__ = [
    "EmbeddingClassifier",
    "Judge",
    "JudgeConfig",
    "Mark",
    "Output",
    "Scorer",
    "TestbedScorer",
    "VectorScorer",
    "projections",
    "vector_classifier",
]
