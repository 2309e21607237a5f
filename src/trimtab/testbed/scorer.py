"""The exact scorer: counts the evidence of every attribute in a text, and whether its sentences are grammatical."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trimtab.testbed import lexicon
from trimtab.testbed.lexicon import PATTERNS, SPECIAL_TOKENS
from trimtab.testbed.process import word_class

_KINDS: Mapping[str, tuple[str, ...]] = {
    "<N>": lexicon.CONCEPTS,
    "<A>": lexicon.TONES,
    "<D>": lexicon.TONES,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a text says about its attributes; every count is exact."""

    words: int
    """Words and marks, special tokens left out."""
    counts: Mapping[str, int]
    """Evidence words of each attribute (nouns, toned words, words of one role)."""
    unknown: tuple[str, ...]
    """Words outside the vocabulary, in order."""
    sentences: int
    """Sentences that end inside the text."""
    grammatical_sentences: int
    """How many of them the grammar can write, verb agreement included."""

    def share(self, attribute: str) -> float:
        """Return the attribute's part of its own kind, such as animals among all nouns; 0 when there is none.

        Raises:
            InputError: there is no such attribute.
        """
        total = sum(self.counts[name] for name in lexicon.kind_of(attribute))
        return self.counts[attribute] / total if total else 0.0

    @property
    def concepts(self) -> dict[str, float]:
        """Share of each concept among the nouns."""
        return {name: self.share(name) for name in lexicon.CONCEPTS}

    @property
    def tones(self) -> dict[str, float]:
        """Share of each tone among the toned words."""
        return {name: self.share(name) for name in lexicon.TONES}

    @property
    def roles(self) -> dict[str, float]:
        """Share of each role among the words that only one role uses."""
        return {name: self.share(name) for name in lexicon.ROLES}

    @property
    def grammatical_share(self) -> float:
        """Grammatical sentences among the finished ones; 0 when none is finished."""
        return self.grammatical_sentences / self.sentences if self.sentences else 0.0

    @property
    def grammatical(self) -> bool:
        """Whether every finished sentence is grammatical and every word known."""
        return self.grammatical_sentences == self.sentences and not self.unknown


def score(text: str, *, after: str = "") -> Evidence:
    """Count the evidence in a text.

    Args:
        text: what to score, such as a continuation; special tokens are passed over.
        after: what stood before it, such as the prompt; its words are not counted, but a sentence that began there is
            judged whole.

    Returns:
        The counts. A last sentence without its end is counted in words, never in sentences.

    Example:
        >>> score("the fox slept near the river.").concepts["animal"]
        1.0
    """
    before, tokens = lexicon.tokenize(after), lexicon.tokenize(text)
    words = [token for token in tokens if token not in SPECIAL_TOKENS]
    found = Counter(words)
    # A sentence that ends inside `before` is not ours to judge: count those of the whole, less those of `before`.
    whole, ended = _judge((*before, *tokens)), _judge(before)
    return Evidence(
        words=len(words),
        counts={name: sum(found[word] for word in lexicon.evidence_words(name)) for name in lexicon.ATTRIBUTES},
        unknown=tuple(word for word in words if word not in lexicon.TOKEN_IDS),
        sentences=len(whole) - len(ended),
        grammatical_sentences=sum(whole) - sum(ended),
    )


def is_grammatical(sentence: str) -> bool:
    """Whether the grammar can write this one whole sentence, in any mode, about anything."""
    return _accepts(lexicon.tokenize(sentence))


def _judge(tokens: Sequence[str]) -> list[bool]:
    return [_accepts(sentence) for sentence in _sentences(tokens)]


def _sentences(tokens: Sequence[str]) -> Iterator[tuple[str, ...]]:
    sentence: list[str] = []
    for token in tokens:
        if token in SPECIAL_TOKENS:
            sentence = []
            continue
        sentence.append(token)
        if token in lexicon.ENDS:
            yield tuple(sentence)
            sentence = []


def _accepts(sentence: tuple[str, ...]) -> bool:
    return any(_fits(pattern, sentence) for pattern in PATTERNS if len(pattern) == len(sentence))


def _fits(pattern: tuple[str, ...], sentence: tuple[str, ...]) -> bool:
    noun = ""
    for slot, word in zip(pattern, sentence, strict=True):
        if slot not in lexicon.SLOTS:
            if word != slot:
                return False
            continue
        kinds = (lexicon.NOUN_CONCEPT[noun],) if slot == "<V>" else _KINDS.get(slot, ("",))
        if not any(word in word_class(slot, kind) for kind in kinds):
            return False
        noun = word if slot == "<N>" else noun
    return True
