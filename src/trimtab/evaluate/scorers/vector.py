"""A steering vector as a classifier: the mean projection of a text's states on it, in the unsteered model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.backends import Backend, Capture, Prompt, Request
from trimtab.directions import Direction, check_origin, load_direction
from trimtab.errors import InputError
from trimtab.evaluate.scorers.base import Mark, Output
from trimtab.evaluate.scorers.held_out import classifier_report, split_questions
from trimtab.results.evaluation import ClassifierReport
from trimtab.steering import SteeringVector


@dataclass(frozen=True, kw_only=True, eq=False)
class VectorScorer:
    """Mean projection of a continuation's tokens on a direction, in hidden units.

    Args:
        vector: with its site, or anything that `load_direction` reads.
        backend: the model, which runs unsteered.
        site: where to read; None: the vector's own.
        label: name of the score; empty: made from the vector's source.
    """

    vector: Any
    backend: Backend
    site: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Column of the scores."""
        return f"vector:{self.label or load_direction(self.vector, hidden_size=self.backend.info.hidden_size).source}"

    def score(self, outputs: Sequence[Output]) -> list[Mark]:
        """Return one mark for each output; an empty one has no value."""
        whole = [index for index, one in enumerate(outputs) if one.token_ids]
        ids = [(*outputs[index].prompt_ids, *outputs[index].token_ids) for index in whole]
        skips = [len(outputs[index].prompt_ids) for index in whole]
        values = dict(zip(whole, projections(self.backend, self.vector, ids, site=self.site, skip=skips), strict=True))
        return [
            Mark(value=values.get(index), reason="" if index in values else "an empty output")
            for index in range(len(outputs))
        ]


def projections(
    backend: Backend,
    vector: str | SteeringVector | Direction,
    texts: Sequence[Prompt],
    *,
    site: str | None = None,
    skip: Sequence[int] | None = None,
) -> list[float]:
    """Return the mean projection of each text's states on the unit direction, unsteered, in float64.

    Args:
        backend: the model.
        vector: with its site, or anything that `load_direction` reads.
        texts: text, token ids or messages.
        site: where to read; None: the vector's own.
        skip: tokens at the start of each text that are left out, such as its prompt.

    Raises:
        InputError: no site, or a text of which nothing is left.
        SteeringError: the vector was made on other weights.
    """
    read = load_direction(vector, hidden_size=backend.info.hidden_size)
    known = vector if isinstance(vector, SteeringVector) else read.calibrated
    if known is not None:
        check_origin(known.model_digest, backend.info.weights_digest, f"vector {read.source}")
    where = site or (str(read.site) if read.site is not None else "")
    if not where:
        raise InputError("the vector does not say its site; give site=, such as layers.3.resid_post")
    if not texts:
        return []
    sums = _Sums(read.unit.double(), list(skip) if skip is not None else [0] * len(texts))
    requests = [Request(prompt=one, id=str(index), max_new_tokens=0) for index, one in enumerate(texts)]
    backend.generate(requests, capture=Capture(sites=(where,)), writer=sums)
    empty = [index for index in range(len(texts)) if not sums.counts.get(index)]
    if empty:
        raise InputError(f"text {empty[0]} has no token left after the {sums.skip[empty[0]]} that are skipped")
    return [sums.totals[index] / sums.counts[index] for index in range(len(texts))]


def vector_classifier(
    backend: Backend,
    vector: str | SteeringVector | Direction,
    texts: Sequence[Prompt],
    labels: Sequence[bool],
    questions: Sequence[str | int],
    *,
    site: str | None = None,
    held_out: float = 0.5,
    seed: int = 0,
) -> ClassifierReport:
    """Say how well a vector tells labelled texts apart, on questions that its threshold was not set on.

    The threshold is the middle between the means of both classes. Give texts that the vector was not made from.

    Args:
        backend: the model, unsteered.
        vector: with its site, or anything that `load_direction` reads.
        texts: texts that the vector was not made from.
        labels: True where the attribute is there.
        questions: what each text answers; a question is on one side only.
        site: where to read.
        held_out: share of the questions that are held out.
        seed: of the split and the interval.

    Raises:
        InputError: labels of one class, or too few questions.
    """
    values = projections(backend, vector, texts, site=site)
    train, test = split_questions(labels, questions, held_out=held_out, seed=seed)
    sides = [[values[i] for i in train if bool(labels[i]) is side] for side in (False, True)]
    threshold = sum(sum(one) / len(one) for one in sides) / 2
    return classifier_report(
        "vector",
        [values[i] for i in test],
        [bool(labels[i]) for i in test],
        [questions[i] for i in test],
        threshold=threshold,
        train=len(train),
        seed=seed,
    )


@dataclass(slots=True)
class _Sums:
    """A writer that keeps sums of projections."""

    unit: Tensor
    skip: list[int]
    totals: dict[int, float] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def write(self, name: str, tensor: Tensor, **fields: Any) -> int:
        index = int(fields["request"])
        kept = torch.as_tensor([int(one) for one in fields["positions"]]) >= self.skip[index]
        along = tensor.detach().cpu().double()[kept] @ self.unit
        self.totals[index] = self.totals.get(index, 0.0) + float(along.sum())
        self.counts[index] = self.counts.get(index, 0) + along.numel()
        return 0

    def write_tokens(self, rows: Iterable[Any]) -> None:
        """Tokens are known already."""

    def write_dose(self, rows: Iterable[Any]) -> None:
        """Nothing is steered."""

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""
