"""Scorers in words, as the command line gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from trimtab.backends import Backend
from trimtab.errors import InputError
from trimtab.evaluate.scorers.base import Scorer
from trimtab.evaluate.scorers.embedding import EmbeddingClassifier
from trimtab.evaluate.scorers.judge import Judge, JudgeConfig
from trimtab.evaluate.scorers.testbed import TestbedScorer
from trimtab.evaluate.scorers.vector import VectorScorer

FORMS = "testbed:ATTRIBUTE, testbed:ATTRIBUTE:share, vector:FILE, classifier:DATA.jsonl or judge"


def parse_scorer(text: str, opened: Callable[[], Backend], judge: Mapping[str, Any]) -> Scorer:
    """Return the scorer that a text stands for.

    Args:
        text: one of `FORMS`.
        opened: opens the unsteered model.
        judge: settings of a judge.

    Raises:
        InputError: another form.
    """
    kind, _, rest = text.partition(":")
    if kind == "testbed" and rest:
        name, _, how = rest.partition(":")
        if how in ("", "share"):
            return TestbedScorer(attribute=name, contrast=not how)
    if kind == "vector" and rest:
        return VectorScorer(vector=rest, backend=opened(), label=rest)
    if kind == "classifier" and rest:
        return EmbeddingClassifier.from_file(rest)
    if text == "judge":
        return Judge(_config(judge))
    raise InputError(f"scorer {text!r}: expected {FORMS}")


def _config(settings: Mapping[str, Any]) -> JudgeConfig:
    names = [one.name for one in fields(JudgeConfig)]
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise InputError(f"judge: unknown setting {unknown[0]!r}; known: {', '.join(names)}")
    if not settings.get("model"):
        raise InputError("the scorer judge needs the name of its model: --judge model=NAME, or judge={'model': NAME}")
    return JudgeConfig(**settings)
