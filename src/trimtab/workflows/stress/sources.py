"""What an attribute's vector is made from, and the two scorers that judge it on evidence they do not share.

On the testbed delta reads the nouns of a concept and the judge its verbs; of the tones each reads half of the
adjectives and half of the adverbs. No word counts for both.
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
TESTBED_DELTA = "share among the nouns (tones: among the adjectives and adverbs of even rank, each sorted)"
TESTBED_JUDGE = "share among the verbs (tones: among the adjectives and adverbs of odd rank, each sorted)"
SENTENCES, HELD_OUT_PAIRS, ABOUT_PAIRS, NEUTRAL_PAIRS = 6, 64, 64, 64
_OPENINGS = (
    ("please tell me about the", "happy", "sad"),
    ("what happened to the", "merry", "bleak"),
    ("why was the", "lovely", "grim"),
    ("could you describe the", "hopeful", "weary"),
    ("i want to know where the", "joyful", "lonely"),
    ("please compare the", "sunny", "dismal"),
)
PROMPTS = tuple(f"<|user|> and everyone felt {felt}. {opening}" for opening, *tones in _OPENINGS for felt in tones)
"""A user's questions without evidence of a concept, each once after a cheerful word and once after a gloomy one.

Which tone the model takes up by itself is a toss that almost any direction tips; after a word of a tone it is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidencePart:
    """Share of an attribute among one part of the evidence words of its kind; 0 where there is none.

    Args:
        attribute: a concept or a tone of the testbed.
        part: 0 or 1; see `part_words`.
    """

    attribute: str
    part: int

    @property
    def name(self) -> str:
        """Column of the scores."""
        return f"testbed:{self.attribute}:part{self.part}"

    def score(self, outputs: Sequence[Output]) -> list[Mark]:
        """Return one mark for each output."""
        tables = {name: part_words(name, self.part) for name in lexicon.kind_of(self.attribute)}
        marks = []
        for one in outputs:
            words = lexicon.tokenize(one.text)
            counts = {name: sum(word in table for word in words) for name, table in tables.items()}
            total = sum(counts.values())
            marks.append(Mark(value=counts[self.attribute] / total if total else 0.0))
        return marks


def part_words(attribute: str, part: int) -> frozenset[str]:
    """Return the evidence of one part: a concept's nouns (0) or verbs (1), every second toned word of each kind."""
    if attribute in lexicon.NOUNS:
        return frozenset((lexicon.NOUNS, lexicon.VERBS)[part][attribute])
    tables = (lexicon.ADJECTIVES, lexicon.ADVERBS)
    return frozenset(word for table in tables for word in sorted(table[attribute])[part::2])


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribute:
    """One thing to steer towards.

    Args:
        name: of it.
        train: examples, of which every sample size takes the first.
        held_out: labelled examples that no vector is made from.
        about: labelled examples from which cleaning learns; on the testbed others than those of the vectors.
        delta: scorers by name: its own and those of the attributes that it is contrasted with.
        judge: likewise, on other evidence. The same names, or its own alone: then its value is taken as it is.
    """

    name: str
    train: ContrastData
    held_out: ContrastData
    about: ContrastData
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
        label_noise: share of the training pairs whose labels are exchanged, spread evenly: every size has its share.

    Raises:
        InputError: no such attribute.
    """
    if name not in TESTBED_ATTRIBUTES:
        raise InputError(f"no attribute {name!r} to stress; the testbed has {', '.join(TESTBED_ATTRIBUTES)}")
    pairs = testbed.contrast(name, size, 3 * seed, sentences=SENTENCES)
    flipped = np.diff(np.floor(np.arange(size + 1) * label_noise + np.random.default_rng([seed, 7]).random())) > 0
    held = testbed.contrast(name, HELD_OUT_PAIRS, 3 * seed + 1, sentences=SENTENCES)
    about = testbed.contrast(name, ABOUT_PAIRS, 3 * seed + 2, sentences=SENTENCES)
    kind = lexicon.kind_of(name)
    return Attribute(
        name=name,
        train=_pairs(f"testbed:{name}", pairs.positive, pairs.negative, flipped.tolist()),
        held_out=_pairs(f"testbed:{name} held out", held.positive, held.negative, [False] * HELD_OUT_PAIRS),
        about=_pairs(f"testbed:{name} about", about.positive, about.negative, [False] * ABOUT_PAIRS),
        delta={other: EvidencePart(attribute=other, part=0) for other in kind},
        judge={other: EvidencePart(attribute=other, part=1) for other in kind},
    )


def file_attribute(name: str, source: Any, seed: int, delta: Mapping[str, Any], judge: Mapping[str, Any]) -> Attribute:
    """Return an attribute of contrast data: a quarter of the questions is held out.

    Scorers may still be their texts; see `begin.parsed`.

    Raises:
        InputError: one label alone, or no scorer of this attribute.
    """
    for what, scorers in (("delta", delta), ("judge", judge)):
        if name not in scorers:
            raise InputError(f"{name}: no {what} scorer has this name; there are: {', '.join(scorers) or 'none'}")
    data = load(source).contrast()
    data.require_contrast()
    parts = split_fractions(data, {"train": 0.75, "held_out": 0.25}, seed=seed)
    train, held_out = parts["train"], parts["held_out"]
    return Attribute(name=name, train=train, held_out=held_out, about=train, delta=delta, judge=judge)


def testbed_neutral(seed: int) -> list[Example]:
    """Return texts of the embedded model's grammar about nothing in particular: topics and tones as they come."""
    texts = testbed.contrast("user", NEUTRAL_PAIRS, 3 * seed + 2, sentences=SENTENCES)
    listed = (*texts.positive, *texts.negative)
    return [Example(text=text, label="neutral", question=f"text {index}") for index, text in enumerate(listed)]


def _pairs(name: str, positive: Sequence[str], negative: Sequence[str], flipped: Sequence[bool]) -> ContrastData:
    examples = [
        Example(text=text, label=label, question=f"pair {index}")
        for index, (above, below, flip) in enumerate(zip(positive, negative, flipped, strict=True))
        for label, text in zip(("pos", "neg"), (below, above) if flip else (above, below), strict=True)
    ]
    return ContrastData(name=name, examples=tuple(examples))
