"""Classifiers are judged on questions that they have never seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trimtab.errors import InputError
from trimtab.evaluate.statistics import auc
from trimtab.results.evaluation import ClassifierReport

_RESAMPLES = 500


def split_questions(
    labels: Sequence[bool], questions: Sequence[str | int], *, held_out: float, seed: int
) -> tuple[list[int], list[int]]:
    """Return the rows to learn from and those to test on; all rows of a question are on one side.

    Args:
        labels: class of each row.
        questions: question of each row.
        held_out: share of the questions to test on.
        seed: of the split.

    Raises:
        InputError: rows of one class, or too few questions for both classes on both sides.
    """
    if len(labels) != len(questions):
        raise InputError(f"{len(labels)} labels and {len(questions)} questions were given; one of each per text")
    if not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out}; a share between 0 and 1 was expected")
    classes = {bool(one) for one in labels}
    if len(classes) < 2:
        raise InputError(
            f"all {len(labels)} labels are of one class; texts with and without the attribute were expected"
        )
    different = sorted(set(questions), key=str)
    order = np.random.default_rng(seed).permutation(len(different))
    for shift in range(len(different)):  # a split that leaves a class out is turned until it does not
        count = min(max(round(held_out * len(different)), 1), len(different) - 1)
        tested = {different[order[(shift + i) % len(different)]] for i in range(count)}
        test = [row for row, one in enumerate(questions) if one in tested]
        train = [row for row, one in enumerate(questions) if one not in tested]
        if all(len({bool(labels[row]) for row in side}) == 2 for side in (train, test)):
            return train, test
    raise InputError(
        f"{len(different)} questions do not give both classes on both sides of a split; more questions were expected"
    )


def classifier_report(
    name: str,
    scores: Sequence[float],
    labels: Sequence[bool],
    questions: Sequence[str | int],
    *,
    threshold: float,
    train: int,
    seed: int,
) -> ClassifierReport:
    """Return accuracy, F1 and AUC of scores on held-out rows; the interval resamples questions."""
    predicted = [score > threshold for score in scores]
    hits = sum(one and label for one, label in zip(predicted, labels, strict=True))
    wrong = sum(one != label for one, label in zip(predicted, labels, strict=True))
    groups: dict[str | int, list[int]] = {}
    for row, one in enumerate(questions):
        groups.setdefault(one, []).append(row)
    generator = np.random.default_rng(seed)
    members = list(groups.values())
    found = []
    for _ in range(_RESAMPLES if len(members) > 1 else 0):
        rows = [row for pick in generator.integers(0, len(members), len(members)) for row in members[pick]]
        drawn = [labels[row] for row in rows]
        if len(set(drawn)) == 2:
            found.append(auc([scores[row] for row in rows], drawn))
    low, high = np.quantile(found, [0.025, 0.975]) if found else (math.nan, math.nan)
    return ClassifierReport(
        name=name,
        train=train,
        held_out=len(labels),
        questions=len(groups),
        accuracy=1 - wrong / len(labels),
        f1=2 * hits / (2 * hits + wrong) if hits or wrong else 0.0,
        auc=auc(scores, labels),
        auc_low=float(low),
        auc_high=float(high),
    )
