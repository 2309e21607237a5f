from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from trimtab import testbed
from trimtab.errors import InputError
from trimtab.testbed import exact, grammar, lexicon, process
from trimtab.testbed.lexicon import BOS, CONCEPTS, EOS, PATTERNS, TONES


def _by_enumeration(tokens: tuple[str, ...]) -> float:
    """P(prose that begins with these whole sentences), by brute force: fix the tone, try every topic of every sentence
    and every pattern, multiply the shares straight, and sum."""
    starts = itertools.product(CONCEPTS, TONES)
    total = math.fsum(_given(tokens, topic, tone, None, None) for topic, tone in starts)
    return total / (len(CONCEPTS) * len(TONES)) * (1 - process.CHAT_SHARE)


def _given(tokens: tuple[str, ...], topic: str, tone: str, last: str | None, previous: int | None) -> float:
    total = 0.0
    for pattern, probability in process.pattern_shares("prose", previous).items():
        latest, slots = last, PATTERNS[pattern]
        for slot, word in zip(slots, tokens, strict=False):
            probability *= _word(slot, word, topic, tone, latest)
            if not probability:
                break
            latest = word if slot in lexicon.SLOTS else latest
        if probability and len(tokens) == len(slots):
            total += probability
        elif probability and len(tokens) > len(slots):
            rest = tokens[len(slots) :]
            moves = process.topic_moves(topic).items()
            following = math.fsum(share * _given(rest, to, tone, latest, pattern) for to, share in moves)
            total += probability * (1 - process.END_SHARE["prose"]) * following
    return total


def _word(slot: str, word: str, topic: str, tone: str, last: str | None) -> float:
    if slot not in lexicon.SLOTS:
        return float(slot == word)
    if slot == "<V>":
        return process.word_shares(slot, lexicon.NOUN_CONCEPT[last or ""], last).get(word, 0.0)
    if slot in ("<P>", "<T>"):
        return process.word_shares(slot, "", last).get(word, 0.0)
    kinds = process.kind_shares(slot, topic if slot == "<N>" else tone)
    return sum(share * process.word_shares(slot, kind, last).get(word, 0.0) for kind, share in kinds.items())


@pytest.mark.parametrize("seed", range(12))
def test_probability_of_a_passage_equals_the_sum_over_all_derivations(seed: int) -> None:
    latents = grammar.Latents(topic=CONCEPTS[seed % 5], tone=TONES[seed % 2])
    tokens = grammar.passage(latents, "prose", 1 + seed % 4, words=seed, patterns=seed + 100)
    got = -math.fsum(exact.surprisals((BOS, *tokens)))
    assert got == pytest.approx(math.log(_by_enumeration(tokens)), rel=1e-12)


def test_next_token_distributions_sum_to_one_and_hold_what_comes() -> None:
    source = random.Random(5)
    for _ in range(15):
        reader = exact.Reader()
        for token in grammar.document(source, max_tokens=200).tokens:
            distribution = reader.distribution()
            assert sum(distribution.values()) == pytest.approx(1, abs=1e-9)
            assert reader.read(token) == pytest.approx(distribution[token], rel=1e-12)


def test_distribution_predicts_how_often_words_are_sampled() -> None:
    """After a fixed beginning, the share of each next word among sampled documents is the predicted one."""
    source = random.Random(6)
    seen: Counter[str] = Counter()
    for _ in range(20_000):
        tokens = grammar.document(source, max_tokens=3).tokens
        if tokens[1] == "nobody":
            seen["nobody"] += 1
        if tokens[1] == "<|user|>":
            seen["chat " + tokens[2]] += 1
    reader = exact.Reader()
    reader.read(BOS)
    expected = reader.distribution()["nobody"]
    assert seen["nobody"] / 20_000 == pytest.approx(expected, abs=5 * math.sqrt(expected / 20_000))
    reader.read("<|user|>")
    chats = sum(count for word, count in seen.items() if word.startswith("chat "))
    for word, share in reader.distribution().items():
        found = seen[f"chat {word}"] / chats
        assert found == pytest.approx(share, abs=5 * math.sqrt(share / chats)), word


def test_posteriors_find_the_latents() -> None:
    latents = grammar.Latents(topic="object", tone="gloomy")
    reader = exact.Reader()
    right = []
    for token in (BOS, *grammar.passage(latents, "prose", 60, words=1, patterns=2)):
        reader.read(token)
        right.append(max(reader.topic, key=reader.topic.__getitem__) == "object")
    assert sum(right) / len(right) > 0.8  # the topic may move at any sentence, so a stray noun is believed for a while
    assert reader.tone["gloomy"] > 0.999


def test_mean_entropy_and_mean_surprisal_agree() -> None:
    source = random.Random(7)
    documents = [grammar.document(source, max_tokens=128).tokens for _ in range(120)]
    surprisals = [value for tokens in documents for value in exact.surprisals(tokens)]
    entropies = [value for tokens in documents for value in exact.conditional_entropies(tokens)]
    differences = [a - b for a, b in zip(surprisals, entropies, strict=True)]
    mean = math.fsum(differences) / len(differences)
    deviation = math.sqrt(math.fsum(value**2 for value in differences) / len(differences))
    assert abs(mean) < 4 * deviation / math.sqrt(len(differences))  # a martingale difference: independent enough
    assert 1.0 < math.fsum(entropies) / len(entropies) < 1.4


def test_entropy_of_a_uniform_choice() -> None:
    assert exact.entropy([0.25] * 4) == pytest.approx(math.log(4))
    assert exact.entropy([1.0, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((BOS, "the", "fox", "broke"), "cannot write 'broke' here; it could write "),
        ((BOS, "fox"), "cannot write 'fox' here"),
        (
            (BOS, "nobody", "forgot", "the", "sad", "fox", ".", EOS, "the"),
            "could write nothing: the document has ended",
        ),
    ],
)
def test_text_that_the_grammar_cannot_write_is_refused(tokens: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        testbed.surprisals(tokens)
