"""Example and ContrastData: labelled texts or conversations that know which question they answer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.backends import Message
from trimtab.errors import InputError
from trimtab.vectors.data.selection import Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One labelled text or conversation.

    Raises:
        InputError: neither or both of text and messages, or no label.
    """

    text: str = ""
    """A plain text; all of it counts."""
    messages: tuple[Message, ...] = ()
    """A conversation; what the assistant says counts."""
    label: str
    """Which side of the contrast it is on, such as "pos"."""
    question: str
    """What it answers. Examples of one question never end up in two splits."""
    score: float | None = None
    """How well it shows what its label says, by whoever graded it; None: not graded."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Other columns of its row, as text."""

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.messages):
            what = "both text and messages" if self.text else "neither text nor messages"
            raise InputError(f"an example of question {self.question!r} has {what}; give one of them")
        if not self.label:
            raise InputError(f"an example of question {self.question!r} has no label; expected one such as 'pos'")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastData:
    """Labelled examples: what has an attribute, and what it is compared with.

    Example:
        >>> data = load("testbed:animal", n=32)
        >>> data.counts
        {'neg': 32, 'pos': 32}
    """

    name: str
    examples: tuple[Example, ...]
    positive: str = "pos"
    """Label of the examples that a vector points towards."""
    negative: str = "neg"
    """Label of the examples that it points away from."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else its source says, such as the prompt of a judge; and what was left out, and why."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def counts(self) -> dict[str, int]:
        """Examples of each label."""
        return dict(sorted(Counter(one.label for one in self.examples).items()))

    @property
    def questions(self) -> tuple[str, ...]:
        """The different questions, in the order of their first example."""
        return tuple(dict.fromkeys(one.question for one in self.examples))

    @property
    def digest(self) -> str:
        """BLAKE2b-256 of the examples in their order, in hex; names and tags left out."""
        state = hashlib.blake2b(digest_size=32)
        for one in self.examples:
            turns = [[turn.role, turn.content] for turn in one.messages]
            state.update(json.dumps([one.text, turns, one.label, one.question]).encode() + b"\n")
        return state.hexdigest()

    def require_contrast(self) -> None:
        """Refuse data of which one side is empty.

        Raises:
            InputError: names the labels that exist.
        """
        counts = self.counts
        for side, label in (("positive", self.positive), ("negative", self.negative)):
            if not counts.get(label):
                exist = ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"
                raise InputError(
                    f"{self.name}: no example has the {side} label {label!r}, and a contrast needs both; "
                    f"labels that exist: {exist}; name them with positive= and negative="
                )

    def select(self, conditions: str | Selection) -> ContrastData:
        """Return the examples that meet conditions such as "label=pos,score>=75".

        Conditions on the score reject what was not graded. How many were left out stands in `about["rejected"]`.

        Raises:
            InputError: conditions that cannot be read, a column that no example has, or nothing is left.
        """
        selection = Selection.parse(conditions) if isinstance(conditions, str) else conditions
        kept = tuple(one for one in self.examples if selection.matches(_row(one), self.columns, self.name))
        if not kept:
            raise InputError(
                f"{self.name}: none of {len(self)} examples meets {str(selection)!r}; labels: {self.counts}"
            )
        rejected = {**self.about.get("rejected", {}), str(selection): len(self) - len(kept)}
        return replace(self, examples=kept, about={**self.about, "rejected": rejected})

    @property
    def columns(self) -> tuple[str, ...]:
        """What conditions can name."""
        tags = sorted({name for one in self.examples for name in one.tags})
        return ("label", "question", "score", *tags)

    def contrast(self) -> ContrastData:
        """Return the examples of the two labels alone."""
        wanted = {self.positive, self.negative}
        return replace(self, examples=tuple(one for one in self.examples if one.label in wanted))

    def pairs(self) -> tuple[tuple[Example, Example], ...]:
        """Return (positive, negative) pairs: the i-th positive of a question with its i-th negative.

        Examples without a partner are left out; `len` tells how many pairs there are.
        """
        found = []
        for members in self.by_question().values():
            positive = [one for one in members if one.label == self.positive]
            negative = [one for one in members if one.label == self.negative]
            found += list(zip(positive, negative, strict=False))
        return tuple(found)

    def by_question(self) -> dict[str, list[Example]]:
        """Return the examples of each question."""
        groups: dict[str, list[Example]] = defaultdict(list)
        for one in self.examples:
            groups[one.question].append(one)
        return dict(groups)

    def of_questions(self, questions: tuple[str, ...] | list[str], part: str = "") -> ContrastData:
        """Return the examples of some questions; `part` is added to the name."""
        wanted = set(questions)
        kept = tuple(one for one in self.examples if one.question in wanted)
        return replace(self, examples=kept, name=f"{self.name} {part}".strip())


def _row(one: Example) -> dict[str, str | float | None]:
    return {**one.tags, "label": one.label, "question": one.question, "score": one.score}
