"""What an attribute's vector is made from, and the two scorers that judge it on evidence they do not share.

On the testbed the evidence words of every attribute are sorted and dealt in turn to two halves: "fox" belongs to the
one that gives delta, "hawk" to the one that judges. No word counts for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab import testbed
from trimtab.errors import InputError
from trimtab.evaluate.scorers import Mark, Output, Scorer
from trimtab.testbed import lexicon
from trimtab.vectors.data import ContrastData, Example, load, split_fractions

TESTBED_ATTRIBUTES = (*testbed.CONCEPTS, *testbed.TONES)
TESTBED_DELTA = "share among the evidence words of even rank (of each attribute's, sorted)"
TESTBED_JUDGE = "share among the evidence words of odd rank (of each attribute's, sorted)"
SENTENCES, HELD_OUT_PAIRS = 6, 64
PROMPTS = tuple(
    f"<|user|> {text}"
    for text in (
        "please tell me about the",
        "what happened to the",
        "why was the",
        "could you describe the",
        "please compare the",
        "i want to know where the",
        "there was a",
        "nobody forgot the",
        "it was a",
        "we talked about the",
        "some say the",
        "today the",
    )
)
"""A user's openings in the testbed's grammar, without any evidence: all of it is left to the continuation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidenceHalf:
    """Share of an attribute among half of the evidence words of its kind; 0 where there is none.

    Args:
        attribute: a concept or a tone of the testbed.
        half: 0 or 1: the words of even or of odd rank.
    """

    attribute: str
    half: int

    @property
    def name(self) -> str:
        """Column of the scores."""
        return f"testbed:{self.attribute}:half{self.half}"

    def score(self, outputs: Sequence[Output]) -> list[Mark]:
        """Return one mark for each output."""
        tables = {name: half_words(name, self.half) for name in lexicon.kind_of(self.attribute)}
        marks = []
        for one in outputs:
            words = lexicon.tokenize(one.text)
            counts = {name: sum(word in table for word in words) for name, table in tables.items()}
            total = sum(counts.values())
            marks.append(Mark(value=counts[self.attribute] / total if total else 0.0))
        return marks


def half_words(attribute: str, half: int) -> frozenset[str]:
    """Return every second evidence word of an attribute, in alphabetical order, beginning with the first or second."""
    return frozenset(sorted(lexicon.evidence_words(attribute))[half::2])


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribute:
    """One thing to steer towards.

    Args:
        name: of it.
        train: examples, of which every sample size takes the first.
        held_out: labelled examples that no vector is made from.
        delta: scorers by name: its own and those of the attributes that it is contrasted with.
        judge: likewise, on other evidence. The same names, or its own alone: then its value is taken as it is.
    """

    name: str
    train: ContrastData
    held_out: ContrastData
    delta: Mapping[str, Scorer]
    judge: Mapping[str, Scorer]

    def first(self, size: int) -> ContrastData:
        """Return the first examples of each label.

        Raises:
            InputError: there are fewer.
        """
        picked: list[Example] = []
        for label in (self.train.positive, self.train.negative):
            found = [one for one in self.train.examples if one.label == label][:size]
            if len(found) < size:
                raise InputError(
                    f"{self.name}: {len(found)} examples are labelled {label!r} and the largest size is {size}; "
                    "give more data or smaller sizes"
                )
            picked += found
        named = f"{self.train.name}[:{size}]"
        return ContrastData(
            name=named, examples=tuple(picked), positive=self.train.positive, negative=self.train.negative
        )


def contrasted(scorers: Mapping[str, Scorer], own: str, outputs: Sequence[Output]) -> list[float]:
    """Return each output's score of one attribute minus the mean of the others; NaN where its own has no value."""
    columns = {name: [one.value for one in scorer.score(outputs)] for name, scorer in scorers.items()}
    found = []
    for index, value in enumerate(columns[own]):
        others = [column[index] for name, column in columns.items() if name != own]
        known = [one for one in others if one is not None]
        found.append(float("nan") if value is None else value - (sum(known) / len(known) if known else 0.0))
    return found


def testbed_attribute(name: str, size: int, seed: int, label_noise: float = 0.0) -> Attribute:
    """Return an attribute of the embedded model.

    Args:
        name: a concept or a tone.
        size: examples of each label.
        seed: of the texts.
        label_noise: share of the training pairs whose labels are exchanged.

    Raises:
        InputError: no such attribute.
    """
    if name not in TESTBED_ATTRIBUTES:
        raise InputError(f"no attribute {name!r} to stress; the testbed has {', '.join(TESTBED_ATTRIBUTES)}")
    pairs = testbed.contrast(name, size, 2 * seed, sentences=SENTENCES)
    flipped = np.random.default_rng([seed, 7]).random(size) < label_noise
    held = testbed.contrast(name, HELD_OUT_PAIRS, 2 * seed + 1, sentences=SENTENCES)
    kind = lexicon.kind_of(name)
    return Attribute(
        name=name,
        train=_pairs(f"testbed:{name}", pairs.positive, pairs.negative, flipped.tolist()),
        held_out=_pairs(f"testbed:{name} held out", held.positive, held.negative, [False] * HELD_OUT_PAIRS),
        delta={other: EvidenceHalf(attribute=other, half=0) for other in kind},
        judge={other: EvidenceHalf(attribute=other, half=1) for other in kind},
    )


def file_attribute(
    name: str, source: Any, seed: int, delta: Mapping[str, Scorer], judge: Mapping[str, Scorer]
) -> Attribute:
    """Return an attribute of contrast data: a quarter of the questions is held out.

    Raises:
        InputError: one label alone, or no scorer of this attribute.
    """
    for what, scorers in (("delta", delta), ("judge", judge)):
        if name not in scorers:
            raise InputError(f"{name}: no {what} scorer has this name; there are: {', '.join(scorers) or 'none'}")
    data = load(source).contrast()
    data.require_contrast()
    parts = split_fractions(data, {"train": 0.75, "held_out": 0.25}, seed=seed)
    return Attribute(name=name, train=parts["train"], held_out=parts["held_out"], delta=delta, judge=judge)


def _pairs(name: str, positive: Sequence[str], negative: Sequence[str], flipped: Sequence[bool]) -> ContrastData:
    examples = [
        Example(text=text, label=label, question=f"pair {index}")
        for index, (above, below, flip) in enumerate(zip(positive, negative, flipped, strict=True))
        for label, text in zip(("pos", "neg"), (below, above) if flip else (above, below), strict=True)
    ]
    return ContrastData(name=name, examples=tuple(examples))
