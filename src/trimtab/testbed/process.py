"""The random process behind the corpus: every probability, in one place.

A document has latents, drawn uniformly: a topic (one concept) and a tone. It is prose, or a chat of turns. Given them:

    topic                stays from sentence to sentence with 0.8, else moves to one of the other concepts
    concept of a noun    the topic with 0.85, each other concept with 0.0375
    tone of a word       the document's with 0.85, the other with 0.15
    word in its class    proportional to exp(s <a(m), b(word)> / 2), m the last word that filled a slot, and never m
                         itself; a and b are seeded standard normal vectors of length 4; uniform at the beginning
    next sentence        proportional to exp(t(previous, next)), t seeded standard normal; hardly the same twice running
    role in a chat turn  a pattern of the turn's own role with 0.8 (user) or 0.5 (assistant), else a plain statement
    end                  after every sentence with 1/40 (prose), 1/2 (user) or 1/20 (assistant)

So text has natural near-ties between words, and its exact probability is a small forward recursion (`exact`).
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from types import MappingProxyType
from typing import Final

from trimtab.testbed import lexicon
from trimtab.testbed.lexicon import CONCEPTS, MODE_PATTERNS, PATTERNS, STATEMENTS, TONES, Mode

TABLE_SEED: Final = 20
TOPIC_STAY: Final = 0.8
TOPIC_SHARE: Final = 0.85
TONE_SHARE: Final = 0.85
CHAT_SHARE: Final = 0.3
AFFINITY: Final = 0.8
FLAVOUR_SHARE: Final = MappingProxyType({"user": 0.8, "assistant": 0.5})
END_SHARE: Final = MappingProxyType({"prose": 1 / 40, "user": 1 / 2, "assistant": 1 / 20})
_RANK = 4
_REPEAT = 0.02


def kind_shares(slot: str, latent: str) -> dict[str, float]:
    """P(concept of a noun | topic) for `<N>`, P(tone of a word | the document's tone) for `<A>` and `<D>`."""
    kinds: tuple[str, ...] = CONCEPTS if slot == "<N>" else TONES
    own = TOPIC_SHARE if slot == "<N>" else TONE_SHARE
    return {kind: own if kind == latent else (1 - own) / (len(kinds) - 1) for kind in kinds}


def word_class(slot: str, kind: str = "") -> tuple[str, ...]:
    """Return the words that may fill a slot, `kind` being the concept (N, V) or the tone (A, D)."""
    tables = {"<N>": lexicon.NOUNS, "<V>": lexicon.VERBS, "<A>": lexicon.ADJECTIVES, "<D>": lexicon.ADVERBS}
    if slot in tables:
        return tables[slot][kind]
    return {"<P>": lexicon.PLACES, "<T>": lexicon.TIMES}[slot]


def topic_moves(topic: str) -> dict[str, float]:
    """P(topic of the next sentence | topic of this one)."""
    away = (1 - TOPIC_STAY) / (len(CONCEPTS) - 1)
    return {concept: TOPIC_STAY if concept == topic else away for concept in CONCEPTS}


@functools.cache
def word_shares(slot: str, kind: str, last: str | None) -> MappingProxyType[str, float]:
    """P(word | slot, its concept or tone, the last word that filled a slot): a distribution over one class."""
    words = word_class(slot, kind)
    if last is None:
        return MappingProxyType(dict.fromkeys(words, 1 / len(words)))
    left, right = _vectors()
    dots = (sum(x * y for x, y in zip(left[last], right[word], strict=True)) for word in words)
    weights = [math.exp(AFFINITY * dot / math.sqrt(_RANK)) for dot in dots]
    weights = [0.0 if word == last else weight for word, weight in zip(words, weights, strict=True)]
    return MappingProxyType(dict(zip(words, _normalised(weights), strict=True)))


@functools.cache
def pattern_shares(mode: Mode, previous: int | None) -> MappingProxyType[int, float]:
    """P(next sentence pattern | mode, previous pattern): a distribution over the mode's patterns."""
    table = _transitions()

    def weight(pattern: int) -> float:
        if previous is None:
            return 1.0
        return _REPEAT if pattern == previous else math.exp(table[previous, pattern])

    plain = [pattern for pattern in MODE_PATTERNS[mode] if pattern < len(STATEMENTS)]
    own = [pattern for pattern in MODE_PATTERNS[mode] if pattern >= len(STATEMENTS)]
    flavour = FLAVOUR_SHARE.get(mode, 0.0)
    shares: dict[int, float] = {}
    for group, mass in ((plain, 1 - flavour), (own, flavour)):
        normal = _normalised([weight(pattern) for pattern in group]) if group else []
        shares.update((pattern, mass * share) for pattern, share in zip(group, normal, strict=True))
    return MappingProxyType(shares)


def _normalised(weights: list[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@functools.cache
def _vectors() -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[float, ...]]]:
    source = random.Random(TABLE_SEED)

    def draw(words: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
        return {word: tuple(source.gauss(0, 1) for _ in range(_RANK)) for word in words}

    return draw(lexicon.OPEN_WORDS), draw(lexicon.OPEN_WORDS)


@functools.cache
def _transitions() -> dict[tuple[int, int], float]:
    source = random.Random(TABLE_SEED + 1)
    every = range(len(PATTERNS))
    return {(first, second): source.gauss(0, 1) for first, second in itertools.product(every, every)}
