"""Splits by question: no question, and so no answer to it, is in two of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trimtab.errors import InputError
from trimtab.vectors.data.examples import ContrastData, Example


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCount:
    """What one split holds."""

    examples: int
    questions: int
    tokens: int
    """Tokens that count, as the function given counted them; 0 without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Data in parts that share no question."""

    parts: Mapping[str, ContrastData]
    counts: Mapping[str, SplitCount]
    left: SplitCount
    """What no budget took."""

    def __getitem__(self, name: str) -> ContrastData:
        return self.parts[name]


def split_fractions(data: ContrastData, fractions: Mapping[str, float], *, seed: int = 0) -> Splits:
    """Split by shares of the questions, such as `{"train": 0.8, "validation": 0.2}`.

    Every part gets at least one question; the labels are spread as evenly as whole questions allow.

    Raises:
        InputError: shares that are not positive or exceed 1, or fewer questions than parts.
    """
    if not fractions or min(fractions.values()) <= 0 or sum(fractions.values()) > 1 + 1e-9:
        raise InputError(f"fractions {dict(fractions)}: numbers above 0 that sum to at most 1 were expected")
    order = _order(data, seed)
    if len(order) < len(fractions):
        raise InputError(
            f"{data.name} has {len(order)} questions; {len(fractions)} splits that share none need at least that many"
        )
    taken: dict[str, list[str]] = {}
    ends, start, share = list(fractions), 0, 0.0
    for place, (name, fraction) in enumerate(fractions.items()):
        share += fraction
        end = max(start + 1, min(round(share * len(order)), len(order) - (len(ends) - 1 - place)))
        taken[name] = order[start:end]
        start = end
    return _make(data, taken, order[start:], lambda one: 0)


def split_tokens(
    data: ContrastData, budgets: Mapping[str, int], count: Callable[[Example], int], *, seed: int = 0
) -> Splits:
    """Fill splits up to token budgets with whole questions, none of which is exceeded.

    Args:
        data: the examples.
        budgets: split -> most tokens, filled in this order, such as `{"train": 100_000, "validation": 10_000}`.
        count: the tokens of an example that enter the loss, such as `lambda e: encoder(e).num_targets`.
        seed: of the order of the questions.

    Raises:
        InputError: a budget that no question is left for, or that is smaller than any; says what there is.
    """
    groups = data.by_question()
    sizes = {question: sum(map(count, members)) for question, members in groups.items()}
    left = _order(data, seed)
    taken: dict[str, list[str]] = {}
    for name, budget in budgets.items():
        used, chosen = 0, []
        for question in left:
            if used + sizes[question] <= budget:
                used += sizes[question]
                chosen.append(question)
        if not chosen:
            smallest = min((sizes[question] for question in left), default=0)
            what = f"the smallest of the {len(left)} questions left has {smallest}" if left else "no question is left"
            total = sum(sizes.values())
            raise InputError(f"{data.name}: split {name!r} of {budget} tokens is empty: {what}; {total} tokens in all")
        taken[name] = chosen
        remaining = set(chosen)
        left = [question for question in left if question not in remaining]
    return _make(data, taken, left, count)


def _make(
    data: ContrastData, taken: Mapping[str, list[str]], left: list[str], count: Callable[[Example], int]
) -> Splits:
    parts = {name: data.of_questions(questions, name) for name, questions in taken.items()}
    counts = {name: _count(part, count) for name, part in parts.items()}
    return Splits(parts=parts, counts=counts, left=_count(data.of_questions(left), count))


def _count(data: ContrastData, count: Callable[[Example], int]) -> SplitCount:
    tokens = sum(count(one) for one in data.examples)
    return SplitCount(examples=len(data), questions=len(data.questions), tokens=tokens)


def _order(data: ContrastData, seed: int) -> list[str]:
    """The questions in a random order in which every kind of question, by the labels it has, is spread evenly."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for question, members in data.by_question().items():
        groups[tuple(sorted({one.label for one in members}))].append(question)
    placed: list[tuple[float, str]] = []
    for kind in sorted(groups):
        questions = groups[kind]
        random.Random(f"{seed}/{kind}").shuffle(questions)
        placed += [((index + 0.5) / len(questions), question) for index, question in enumerate(questions)]
    return [question for _, question in sorted(placed)]
