from __future__ import annotations

import random

import pytest

from trimtab import testbed
from trimtab.errors import InputError
from trimtab.testbed import grammar, lexicon


def test_counts_and_shares_by_hand() -> None:
    evidence = testbed.score("the sad fox slept near the river. we talked about the fox and the lamp. please tell me")
    assert evidence.counts["animal"] == 2
    assert evidence.counts["object"] == 1
    assert evidence.counts["gloomy"] == 1
    assert evidence.counts["user"] == 3
    assert evidence.concepts == {
        "person": 0.0,
        "change": 0.0,
        "animal": pytest.approx(2 / 3),
        "object": pytest.approx(1 / 3),
        "action": 0.0,
    }
    assert evidence.tones == {"cheerful": 0.0, "gloomy": 1.0}
    assert evidence.roles == {"user": 1.0, "assistant": 0.0}
    assert evidence.words == 20
    assert evidence.sentences == 2
    assert evidence.grammatical_sentences == 1  # the first has an adjective in a pattern without one
    assert evidence.grammatical_share == 0.5
    assert not evidence.grammatical


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("the fox slept near the river.", True),
        ("The FOX slept near the river .", True),
        ("the fox broke near the river.", False),
        ("the fox slept, but the lamp broke.", True),
        ("the fox slept, but the lamp slept.", False),
        ("the fox slept near the lamp.", False),
        ("here is a fact: the nap lasted.", True),
        ("why was the nap so sad?", True),
        ("why was the nap so sad.", False),
        ("the fox slept near the river", False),
        ("", False),
    ],
)
def test_grammatical_sentences(sentence: str, expected: bool) -> None:
    assert testbed.is_grammatical(sentence) is expected


def test_grammar_text_is_grammatical_whatever_it_is_about() -> None:
    source = random.Random(3)
    for _ in range(60):
        document = grammar.document(source, max_tokens=200)
        evidence = testbed.score(lexicon.render(document.tokens))
        assert evidence.grammatical
        assert evidence.sentences > 0


def test_a_sentence_begun_in_the_prompt_is_judged_whole_and_counted_once() -> None:
    evidence = testbed.score("slept near the river. the lamp", after="the cat rested near the hill. the fox")
    assert (evidence.sentences, evidence.grammatical_sentences) == (1, 1)
    assert evidence.counts["animal"] == 0
    assert evidence.counts["object"] == 1
    alone = testbed.score("slept near the river.")
    assert (alone.sentences, alone.grammatical_sentences) == (1, 0)


def test_special_tokens_are_passed_over_and_end_a_sentence() -> None:
    evidence = testbed.score("<bos> <|user|> the fox <eos> slept near the river. <pad>")
    assert (evidence.words, evidence.sentences, evidence.grammatical_sentences) == (7, 1, 0)
    assert evidence.unknown == ()


def test_unknown_words_are_named() -> None:
    evidence = testbed.score("the zebra slept near the river.")
    assert evidence.unknown == ("zebra",)
    assert not evidence.grammatical


def test_empty_text_has_no_evidence() -> None:
    evidence = testbed.score("")
    assert (evidence.words, evidence.sentences, evidence.grammatical_share) == (0, 0, 0.0)
    assert set(evidence.concepts.values()) == {0.0}


def test_share_of_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(InputError, match="no attribute 'plant' in the testbed; choose one of person, change"):
        testbed.score("the fox").share("plant")
