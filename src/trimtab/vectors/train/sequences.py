"""What a training reads: token sequences with the tokens that count, preference pairs, and disjoint splits of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from trimtab.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSequence:
    """One text as the model reads it."""

    ids: tuple[int, ...]
    targets: tuple[bool, ...]
    """Whether a token enters the loss; the first one cannot, because nothing predicts it."""
    question: str = ""
    """What it answers; the splits must not share one. "" belongs to none."""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.targets):
            raise InputError(f"{len(self.ids)} tokens and {len(self.targets)} targets; one per token was expected")
        if not any(self.targets[1:]):
            raise InputError(
                f"no token of a sequence of {len(self.ids)} would enter the loss; mark at least one after the first"
            )

    @property
    def num_targets(self) -> int:
        """Tokens that enter the loss."""
        return sum(self.targets[1:])

    @property
    def prompt_length(self) -> int:
        """Tokens before the first target."""
        return self.targets.index(True, 1)

    def cut(self, length: int) -> TokenSequence | None:
        """Return the first `length` tokens; None when no target is left."""
        if len(self.ids) <= length:
            return self
        if not any(self.targets[1:length]):
            return None
        return replace(self, ids=self.ids[:length], targets=self.targets[:length])


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Two answers to one prompt, the first preferred."""

    chosen: TokenSequence
    rejected: TokenSequence

    @property
    def question(self) -> str:
        """What both answer."""
        return self.chosen.question


Item = TokenSequence | Preference


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Splits that share no question.

    Raises:
        InputError: no training sequence, sequences mixed with pairs, a question in two splits, or prompted sequences
            that do not have the targets of the validation's.
    """

    name: str
    train: tuple[Item, ...]
    validation: tuple[Item, ...] = ()
    test: tuple[Item, ...] = ()
    prompted: tuple[TokenSequence, ...] = ()
    """The validation sequences under the prompt that the vector is to replace, in their order; () where none is."""

    def __post_init__(self) -> None:
        if not self.train:
            raise InputError(f"{self.name}: no training sequence; at least one was expected")
        kinds = {type(one) for one in (*self.train, *self.validation, *self.test)}
        if len(kinds) > 1:
            raise InputError(f"{self.name}: sequences and preference pairs are mixed; give one of the two")
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        seen: dict[str, str] = {}
        for split, items in splits.items():
            for question in {item.question for item in items} - {""}:
                if question in seen:
                    raise InputError(
                        f"{self.name}: the question {question[:60]!r} is in {seen[question]} and in {split}; split "
                        "by question, else the validation measures what was learned by heart"
                    )
                seen[question] = split
        if self.prompted and [_said(one) for one in self.prompted] != [_said(_first(one)) for one in self.validation]:
            raise InputError(
                f"{self.name}: the prompted sequences do not have the targets of the validation sequences; give the "
                "same answers under the other prompt, in the same order"
            )

    @property
    def pairs(self) -> bool:
        """Whether these are preference pairs."""
        return isinstance(self.train[0], Preference)

    @property
    def digest(self) -> str:
        """BLAKE2b-256 of all tokens and targets, in hex."""
        made = hashlib.blake2b(digest_size=32)
        for items in (self.train, self.validation, self.test, self.prompted):
            made.update(b"|")
            for one in sequences(items):
                made.update(repr((one.ids, one.targets)).encode())
        return made.hexdigest()


def sequences(items: Iterable[Item]) -> list[TokenSequence]:
    """Return the sequences of items, those of a pair after one another."""
    found: list[TokenSequence] = []
    for item in items:
        found += [item] if isinstance(item, TokenSequence) else [item.chosen, item.rejected]
    return found


def cut(items: Sequence[Item], length: int) -> tuple[list[Item], int, int]:
    """Cut items to a length.

    Returns:
        The items that still have a target, how many sequences were cut, and how many items were dropped.
    """
    kept: list[Item] = []
    shortened = 0
    for item in items:
        parts = sequences([item])
        found = [one.cut(length) for one in parts]
        if any(one is None for one in found):
            continue
        shortened += sum(one is not two for one, two in zip(found, parts, strict=True))
        whole = [one for one in found if one is not None]
        kept.append(whole[0] if len(whole) == 1 else Preference(chosen=whole[0], rejected=whole[1]))
    return kept, shortened, len(items) - len(kept)


def _first(item: Item) -> TokenSequence:
    return item if isinstance(item, TokenSequence) else item.chosen


def _said(one: TokenSequence) -> tuple[int, ...]:
    return tuple(token for token, target in zip(one.ids, one.targets, strict=True) if target)
