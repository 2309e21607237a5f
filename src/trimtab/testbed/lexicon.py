"""The closed vocabulary: which words are evidence of what, and the sentence patterns they fill.

Every word stands in one class only, so a word is exact evidence: whoever writes "fox" wrote about an animal.
A sentence pattern is a row of literal words and slots:

    <N> a noun, of any concept            <V> a verb that agrees with the nearest noun before it
    <A> an adjective, of either tone      <D> an adverb, of either tone
    <P> a place                           <T> a time
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import MappingProxyType
from typing import Final, Literal

from trimtab.errors import InputError

Concept = Literal["person", "change", "animal", "object", "action"]
Tone = Literal["cheerful", "gloomy"]
Role = Literal["user", "assistant"]
Mode = Literal["prose", "user", "assistant"]

CONCEPTS: Final[tuple[Concept, ...]] = ("person", "change", "animal", "object", "action")
TONES: Final[tuple[Tone, ...]] = ("cheerful", "gloomy")
ROLES: Final[tuple[Role, ...]] = ("user", "assistant")
ATTRIBUTES: Final[tuple[str, ...]] = (*CONCEPTS, *TONES, *ROLES)

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
ROLE_MARKS: Final = MappingProxyType({"user": "<|user|>", "assistant": "<|assistant|>"})
SPECIAL_TOKENS: Final = (PAD, BOS, EOS, UNK, *ROLE_MARKS.values())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS: Final = MappingProxyType(
    {
        "person": _words("teacher doctor farmer child neighbor sailor baker singer painter stranger gardener queen"),
        "change": _words("thaw growth decline sunrise sunset delay reform revival recovery shift merger breakdown"),
        "animal": _words("cat dog horse fox hawk rabbit wolf sparrow goat turtle bear badger"),
        "object": _words("lamp table kettle clock mirror basket ladder letter coin bottle blanket key"),
        "action": _words("dance walk race climb swim chase hunt jump search march ride nap"),
    }
)
VERBS: Final = MappingProxyType(
    {
        "person": ("spoke", "smiled", "listened", "waved", "worked"),
        "change": ("began", "spread", "deepened", "slowed", "passed"),
        "animal": ("slept", "hid", "ran", "drank", "rested"),
        "object": ("fell", "broke", "shone", "rattled", "vanished"),
        "action": ("lasted", "finished", "resumed", "failed", "paused"),
    }
)
ADJECTIVES: Final = MappingProxyType(
    {
        "cheerful": _words("happy bright sunny lovely merry joyful warm hopeful sweet gentle"),
        "gloomy": _words("sad dark cold dreary lonely grim bitter weary bleak dismal"),
    }
)
ADVERBS: Final = MappingProxyType(
    {
        "cheerful": ("happily", "brightly", "gladly", "warmly"),
        "gloomy": ("sadly", "coldly", "bitterly", "wearily"),
    }
)
PLACES: Final = ("river", "garden", "bridge", "tower", "market", "forest", "harbor", "hill")
TIMES: Final = ("today", "yesterday", "tonight", "later", "soon", "meanwhile")

STATEMENTS: Final = (
    "the <N> <V> near the <P> .",
    "the <A> <N> <V> <D> .",
    "there was a <A> <N> by the <P> .",
    "we talked about the <N> and the <N> .",
    "<T> the <N> <V> and everyone felt <A> .",
    "nobody forgot the <A> <N> .",
    "it was a <A> day for the <N> .",
    "the <N> <V> , but the <N> <V> .",
    "behind the <P> stood a <N> .",
    "the <N> was <A> until the <N> <V> .",
    "some say the <N> <V> when the <N> <V> .",
    "<T> we found a <N> by the <P> .",
)
QUESTIONS: Final = (
    "please tell me about the <N> .",
    "what happened to the <A> <N> ?",
    "why was the <N> so <A> ?",
    "could you describe the <N> by the <P> ?",
    "please compare the <N> and the <N> .",
    "i want to know where the <N> <V> .",
)
ANSWERS: Final = (
    "certainly , the <N> <V> near the <P> .",
    "indeed , the <N> was <A> .",
    "i believe the <N> <V> <D> .",
    "in short , the <N> and the <N> were <A> .",
    "here is a fact : the <N> <V> .",
    "i suggest a <A> <N> for you .",
)
PATTERNS: Final = tuple(tuple(text.split()) for text in (*STATEMENTS, *QUESTIONS, *ANSWERS))
MODE_PATTERNS: Final = MappingProxyType(
    {
        "prose": tuple(range(len(STATEMENTS))),
        "user": tuple(range(len(STATEMENTS) + len(QUESTIONS))),
        "assistant": (
            *range(len(STATEMENTS)),
            *range(len(STATEMENTS) + len(QUESTIONS), len(PATTERNS)),
        ),
    }
)
ENDS: Final = (".", "?")
SLOTS: Final = ("<N>", "<V>", "<A>", "<D>", "<P>", "<T>")

_TOKEN = re.compile(r"<\|?\w+\|?>|\w+|[^\w\s]")
_SPACE_BEFORE_MARK = re.compile(r" ([.,?:])")


def _literals(patterns: Iterable[str]) -> tuple[str, ...]:
    words = (word for text in patterns for word in text.split() if word not in SLOTS)
    return tuple(dict.fromkeys(words))


def _role_words(own: Iterable[str], *others: tuple[str, ...]) -> frozenset[str]:
    elsewhere = {word for patterns in others for word in _literals(patterns)}
    return frozenset(word for word in _literals(own) if word.isalpha() and word not in elsewhere)


LITERALS: Final = _literals((*STATEMENTS, *QUESTIONS, *ANSWERS))
ROLE_WORDS: Final = MappingProxyType(
    {
        "user": _role_words(QUESTIONS, STATEMENTS, ANSWERS),
        "assistant": _role_words(ANSWERS, STATEMENTS, QUESTIONS),
    }
)
OPEN_WORDS: Final[tuple[str, ...]] = (
    *TIMES,
    *PLACES,
    *(word for table in (ADVERBS, ADJECTIVES, VERBS, NOUNS) for words in table.values() for word in words),
)
VOCABULARY: Final[tuple[str, ...]] = (*SPECIAL_TOKENS, *LITERALS, *OPEN_WORDS)
TOKEN_IDS: Final = MappingProxyType({word: index for index, word in enumerate(VOCABULARY)})

NOUN_CONCEPT: Final = MappingProxyType({word: concept for concept, words in NOUNS.items() for word in words})
WORD_TONE: Final = MappingProxyType(
    {word: tone for table in (ADJECTIVES, ADVERBS) for tone, words in table.items() for word in words}
)


def evidence_words(attribute: str) -> frozenset[str]:
    """Return the words that are evidence of an attribute: nouns, toned words, or words of one role.

    Raises:
        InputError: there is no such attribute; the message lists all.
    """
    check_attribute(attribute)
    if attribute in NOUNS:
        return frozenset(NOUNS[attribute])
    if attribute in ADJECTIVES:
        return frozenset((*ADJECTIVES[attribute], *ADVERBS[attribute]))
    return ROLE_WORDS[attribute]


def kind_of(attribute: str) -> tuple[str, ...]:
    """Return the attributes that an attribute stands among: the concepts, the tones or the roles.

    Raises:
        InputError: there is no such attribute; the message lists all.
    """
    check_attribute(attribute)
    kinds: tuple[tuple[str, ...], ...] = (CONCEPTS, TONES, ROLES)
    return next(kind for kind in kinds if attribute in kind)


def check_attribute(attribute: str) -> None:
    """Raise `InputError` unless the testbed knows this attribute."""
    if attribute not in ATTRIBUTES:
        raise InputError(f"no attribute {attribute!r} in the testbed; choose one of {', '.join(ATTRIBUTES)}")


def tokenize(text: str) -> tuple[str, ...]:
    """Split text as the model's tokenizer does: lower case, words, single marks and special tokens."""
    return tuple(_TOKEN.findall(text.lower()))


def render(tokens: Iterable[str]) -> str:
    """Join tokens to text; marks stand without a space before them. `tokenize` takes it back apart."""
    return _SPACE_BEFORE_MARK.sub(r"\1", " ".join(tokens))
