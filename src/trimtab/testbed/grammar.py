"""Sample text with known attributes: documents, prompts, chats and contrast sets. Pure Python, seeded, repeatable."""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from trimtab.errors import InputError
from trimtab.testbed import lexicon, process
from trimtab.testbed.lexicon import BOS, CONCEPTS, EOS, PATTERNS, ROLE_MARKS, ROLES, TONES, Concept, Mode, Tone

Kind = Literal["prose", "chat"]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """What a document is about, and how it feels."""

    topic: Concept
    """Of the first sentence; it drifts in a document, and stays in a `passage`."""
    tone: Tone


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One sampled document; `tokens` begin with the beginning-of-text token."""

    tokens: tuple[str, ...]
    latents: Latents
    kind: Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastSet:
    """Texts with and without evidence of an attribute, in pairs.

    Text i of both sides was written from the same random numbers and differs in that latent only: pairs of a concept or
    a tone share their sentence patterns, pairs of a role share topic and tone.
    """

    attribute: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


class Writer:
    """Writes sentences of one document: keeps what the process looks back at."""

    def __init__(
        self, latents: Latents, words: random.Random, patterns: random.Random, *, drifting: bool = True
    ) -> None:
        self._topic: str = latents.topic
        self._tone: str = latents.tone
        self._words, self._patterns = words, patterns
        self._drifting = drifting
        self._last: str | None = None
        self._previous: int | None = None

    def sentence(self, mode: Mode) -> list[str]:
        """Write the next sentence in a mode."""
        if self._drifting and self._previous is not None:
            self._topic = _pick(self._words, *_topic_table(self._topic))
        self._previous = _pick(self._patterns, *_pattern_table(mode, self._previous))
        return [self._fill(slot) if slot in lexicon.SLOTS else slot for slot in PATTERNS[self._previous]]

    def _fill(self, slot: str) -> str:
        kind = ""
        if slot == "<N>":
            kind = _pick(self._words, *_kind_table(slot, self._topic))
        elif slot == "<V>":
            assert self._last is not None, "a pattern has a verb before its first noun"
            kind = lexicon.NOUN_CONCEPT[self._last]
        elif slot in ("<A>", "<D>"):
            kind = _pick(self._words, *_kind_table(slot, self._tone))
        self._last = _pick(self._words, *_word_table(slot, kind, self._last))
        return self._last


def document(source: random.Random, *, max_tokens: int = 512) -> Document:
    """Sample one document from the whole process.

    Args:
        source: the random numbers; the same state gives the same document.
        max_tokens: cut after this many tokens; most documents are longer than 256.
    """
    latents = Latents(topic=source.choice(CONCEPTS), tone=source.choice(TONES))
    kind: Kind = "chat" if source.random() < process.CHAT_SHARE else "prose"
    writer = Writer(latents, source, source)
    tokens = [BOS]
    turns: tuple[Mode, ...] = ("user", "assistant") if kind == "chat" else ("prose",)
    for mode in itertools.cycle(turns):
        if mode in ROLE_MARKS:
            tokens.append(ROLE_MARKS[mode])
        while len(tokens) < max_tokens:
            tokens += writer.sentence(mode)
            if source.random() < process.END_SHARE[mode]:
                tokens.append(EOS)
                break
        if kind == "prose" or len(tokens) >= max_tokens:
            return Document(tokens=tuple(tokens[:max_tokens]), latents=latents, kind=kind)
    raise AssertionError("unreachable")


def passage(latents: Latents, mode: Mode, sentences: int, *, words: int, patterns: int) -> tuple[str, ...]:
    """Write whole sentences on one topic; `words` and `patterns` are seeds, so that passages can share patterns."""
    writer = Writer(latents, random.Random(words), random.Random(patterns), drifting=False)
    return tuple(word for _ in range(sentences) for word in writer.sentence(mode))


def prompts(n: int, seed: int = 0) -> tuple[str, ...]:
    """Return n different prose openings that break off inside a sentence and leave its continuation open.

    Topics and tones take turns; one or two whole sentences come before the open one.

    Raises:
        InputError: n is not positive.
    """
    return _distinct(n, "prompts", seed, _opening, lambda prompt: True)


def chat(n: int, seed: int = 0) -> tuple[tuple[dict[str, str], ...], ...]:
    """Return n different conversations that end with a user's question, for `tokenizer.apply_chat_template`.

    Every second one is a single question; the others have one exchange before it.

    Raises:
        InputError: n is not positive.
    """
    words = lexicon.ROLE_WORDS["user"]
    return _distinct(n, "chats", seed, _conversation, lambda chat: not words.isdisjoint(chat[-1]["content"].split()))


def contrast(attribute: str, n: int, seed: int = 0, *, sentences: int = 3) -> ContrastSet:
    """Return n matched pairs of short passages, with and without an attribute.

    Args:
        attribute: one of `ATTRIBUTES`. For a concept the other side takes the other concepts in turn; for a tone the
            other tone; for a role the other role's turns.
        n: number of pairs.
        seed: the same seed gives the same set.
        sentences: whole sentences in each passage.

    Raises:
        InputError: there is no such attribute, or n or sentences is not positive.
    """
    lexicon.check_attribute(attribute)
    _check_positive(sentences, "sentences")
    words = lexicon.evidence_words(attribute)

    def differs(pair: tuple[str, str]) -> bool:
        with_it, without = (words.isdisjoint(lexicon.tokenize(text)) for text in pair)
        return without and not with_it

    pairs = _distinct(n, "pairs", seed, lambda source, index: _pair(attribute, source, index, sentences), differs)
    positive, negative = zip(*pairs, strict=True)
    return ContrastSet(attribute=attribute, positive=positive, negative=negative)


def _pair(attribute: str, source: random.Random, index: int, sentences: int) -> tuple[str, str]:
    words, patterns = source.getrandbits(32), source.getrandbits(32)
    base = _latents(index)

    def write(topic: Concept, tone: Tone, mode: Mode) -> str:
        latents = Latents(topic=topic, tone=tone)
        return lexicon.render(passage(latents, mode, sentences, words=words, patterns=patterns))

    for role, other_role in (ROLES, ROLES[::-1]):
        if attribute == role:
            return write(base.topic, base.tone, role), write(base.topic, base.tone, other_role)
    for tone, other_tone in (TONES, TONES[::-1]):
        if attribute == tone:
            return write(base.topic, tone, "prose"), write(base.topic, other_tone, "prose")
    concept = next(name for name in CONCEPTS if name == attribute)
    others = [name for name in CONCEPTS if name != attribute]
    return write(concept, base.tone, "prose"), write(others[index % len(others)], base.tone, "prose")


def _opening(source: random.Random, index: int) -> str:
    writer = Writer(_latents(index), source, source)
    whole = [word for _ in range(source.randint(1, 2)) for word in writer.sentence("prose")]
    last = writer.sentence("prose")
    return lexicon.render((*whole, *last[: source.randint(1, len(last) - 3)]))


def _conversation(source: random.Random, index: int) -> tuple[dict[str, str], ...]:
    writer = Writer(_latents(index), source, source)

    def message(role: Literal["user", "assistant"], sentences: int) -> dict[str, str]:
        words = (word for _ in range(sentences) for word in writer.sentence(role))
        return {"role": role, "content": lexicon.render(words)}

    before = (message("user", 1), message("assistant", source.randint(2, 3))) if index % 2 else ()
    return (*before, message("user", source.randint(1, 2)))


def _distinct(
    n: int, what: str, seed: int, make: Callable[[random.Random, int], _T], accept: Callable[[_T], bool]
) -> tuple[_T, ...]:
    _check_positive(n, what)
    found: list[_T] = []
    for index in range(n):
        attempts = (make(_source(what, seed, index, attempt), index) for attempt in itertools.count())
        found.append(next(item for item in attempts if accept(item) and item not in found))
    return tuple(found)


def _latents(index: int) -> Latents:
    return Latents(topic=CONCEPTS[index % len(CONCEPTS)], tone=TONES[index // len(CONCEPTS) % len(TONES)])


def _source(*purpose: object) -> random.Random:
    return random.Random("/".join(map(str, purpose)))


def _check_positive(n: int, what: str) -> None:
    if n < 1:
        raise InputError(f"asked for {n} {what}; ask for at least 1")


def _pick(source: random.Random, items: tuple[_T, ...], cumulative: tuple[float, ...]) -> _T:
    point = source.random() * cumulative[-1]
    return items[bisect.bisect_right(cumulative, point, hi=len(items) - 1)]


def _table(shares: Mapping[_T, float]) -> tuple[tuple[_T, ...], tuple[float, ...]]:
    return tuple(shares), tuple(itertools.accumulate(shares.values()))


@functools.cache
def _pattern_table(mode: Mode, previous: int | None) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return _table(process.pattern_shares(mode, previous))


@functools.cache
def _word_table(slot: str, kind: str, last: str | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    return _table(process.word_shares(slot, kind, last))


@functools.cache
def _topic_table(topic: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    return _table(process.topic_moves(topic))


@functools.cache
def _kind_table(slot: str, latent: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    return _table(process.kind_shares(slot, latent))
