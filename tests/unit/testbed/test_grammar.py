from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import testbed
from trimtab.errors import InputError
from trimtab.testbed import grammar, lexicon, process


def test_vocabulary_is_closed_and_every_word_stands_in_one_class_only() -> None:
    assert len(testbed.VOCABULARY) == len(set(testbed.VOCABULARY))
    assert 155 <= len(testbed.VOCABULARY) <= 220
    evidence = [testbed.lexicon.evidence_words(name) for name in testbed.ATTRIBUTES]
    for one, other in itertools.combinations(evidence, 2):
        assert not one & other
    assert all(words for words in evidence)


def test_articles_read_as_english() -> None:
    after_a = [*lexicon.NOUN_CONCEPT, *(word for words in lexicon.ADJECTIVES.values() for word in words)]
    assert not [word for word in after_a if word[0] in "aeiou"]


def test_every_pattern_has_a_noun_before_its_first_verb() -> None:
    for pattern in lexicon.PATTERNS:
        if "<V>" in pattern:
            assert "<N>" in pattern[: pattern.index("<V>")], pattern


@pytest.mark.parametrize("slot", lexicon.SLOTS)
@pytest.mark.parametrize("noun", [None, "fox", "lamp"])
def test_word_shares_are_distributions_that_never_repeat_the_last_noun(slot: str, noun: str | None) -> None:
    kinds = {"<N>": lexicon.CONCEPTS, "<V>": lexicon.CONCEPTS, "<A>": lexicon.TONES, "<D>": lexicon.TONES}
    for kind in kinds.get(slot, ("",)):
        shares = process.word_shares(slot, kind, noun)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
        assert shares.get(noun or "", 0.0) == 0.0


@pytest.mark.parametrize("mode", ["prose", "user", "assistant"])
def test_pattern_shares_are_distributions(mode: lexicon.Mode) -> None:
    for previous in (None, *lexicon.MODE_PATTERNS[mode]):
        shares = process.pattern_shares(mode, previous)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
        own = sum(share for pattern, share in shares.items() if pattern >= len(lexicon.STATEMENTS))
        assert own == pytest.approx(process.FLAVOUR_SHARE.get(mode, 0.0))


def test_same_seed_same_text_other_seed_other_text() -> None:
    first, again, other = (grammar.document(random.Random(seed)) for seed in (3, 3, 4))
    assert first == again
    assert first.tokens != other.tokens
    assert testbed.prompts(12, 5) == testbed.prompts(12, 5)
    assert testbed.prompts(12, 5) != testbed.prompts(12, 6)
    assert testbed.prompts(12, 5)[:4] == testbed.prompts(4, 5)


def test_the_first_documents_stay_what_they_were() -> None:
    """The corpus is part of what ships: a change of the grammar must be meant, and then the model is built again."""
    assert testbed.prompts(2, 0) == (
        "we talked about the queen and the painter. behind",
        "behind the forest stood a merger. the delay slowed near the harbor. the recovery was lovely",
    )


def test_documents_use_known_words_and_keep_to_their_limit() -> None:
    source = random.Random(1)
    documents = [grammar.document(source, max_tokens=300) for _ in range(200)]
    assert {token for document in documents for token in document.tokens} <= set(testbed.VOCABULARY)
    assert all(document.tokens[0] == lexicon.BOS and len(document.tokens) <= 300 for document in documents)
    kinds = Counter(document.kind for document in documents)
    assert 30 <= kinds["chat"] <= 90  # 0.3 of 200, six standard deviations either way
    long = sum(len(document.tokens) >= 128 for document in documents)
    assert long >= 120


def test_nouns_follow_the_topic_and_toned_words_the_tone() -> None:
    latents = grammar.Latents(topic="action", tone="gloomy")
    tokens = grammar.passage(latents, "prose", 2000, words=1, patterns=2)
    concepts = [lexicon.NOUN_CONCEPT[token] for token in tokens if token in lexicon.NOUN_CONCEPT]
    tones = [lexicon.WORD_TONE[token] for token in tokens if token in lexicon.WORD_TONE]
    for found, own, share in ((concepts, "action", process.TOPIC_SHARE), (tones, "gloomy", process.TONE_SHARE)):
        spread = (share * (1 - share) / len(found)) ** 0.5
        assert found.count(own) / len(found) == pytest.approx(share, abs=5 * spread)


def test_topics_drift_in_documents_and_all_concepts_are_equally_common() -> None:
    source = random.Random(2)
    documents = [grammar.document(source, max_tokens=512).tokens for _ in range(300)]
    nouns = Counter(
        lexicon.NOUN_CONCEPT[token] for tokens in documents for token in tokens if token in lexicon.NOUN_CONCEPT
    )
    assert all(0.15 < nouns[concept] / nouns.total() < 0.25 for concept in lexicon.CONCEPTS)
    seen = [{lexicon.NOUN_CONCEPT.get(token) for token in tokens} - {None} for tokens in documents if len(tokens) > 400]
    assert all(len(concepts) >= 3 for concepts in seen)


def test_prompts_are_different_and_break_off_inside_a_sentence() -> None:
    prompts = testbed.prompts(60, 1)
    assert len(set(prompts)) == 60
    for prompt in prompts:
        assert prompt[-1].isalpha() or prompt[-1] in ",:"
        before = prompt[: prompt.rindex(".") + 1]
        assert testbed.score(before).grammatical_share == 1.0


def test_chats_end_with_a_question_of_the_user() -> None:
    chats = testbed.chat(20, 1)
    assert len({str(chat) for chat in chats}) == 20
    for chat in chats:
        assert [message["role"] for message in chat] in (["user"], ["user", "assistant", "user"])
        assert testbed.score(chat[-1]["content"]).roles["user"] == 1.0
        assert all(testbed.score(message["content"]).grammatical for message in chat)


@pytest.mark.parametrize("attribute", testbed.ATTRIBUTES)
def test_contrast_sets_have_the_evidence_on_one_side_only(attribute: str) -> None:
    pairs = testbed.contrast(attribute, 30, 7)
    assert len(set(zip(pairs.positive, pairs.negative, strict=True))) == 30
    for positive, negative in zip(pairs.positive, pairs.negative, strict=True):
        assert testbed.score(positive).counts[attribute] > 0
        assert testbed.score(negative).counts[attribute] == 0
        assert testbed.score(positive).grammatical
        assert testbed.score(negative).grammatical


@pytest.mark.parametrize("attribute", ["animal", "gloomy"])
def test_contrast_pairs_share_their_sentence_patterns(attribute: str) -> None:
    pairs = testbed.contrast(attribute, 20, 3)
    for positive, negative in zip(pairs.positive, pairs.negative, strict=True):
        shapes = [[word for word in text.split() if word in lexicon.LITERALS] for text in (positive, negative)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: testbed.prompts(0), "asked for 0 prompts; ask for at least 1"),
        (lambda: testbed.chat(-1), "asked for -1 chats; ask for at least 1"),
        (lambda: testbed.contrast("animal", 0), "asked for 0 pairs; ask for at least 1"),
        (lambda: testbed.contrast("animal", 1, sentences=0), "asked for 0 sentences; ask for at least 1"),
        (
            lambda: testbed.contrast("plant", 1),
            "no attribute 'plant' in the testbed; choose one of person, change, animal, object, action, cheerful, "
            "gloomy, user, assistant",
        ),
    ],
)
def test_bad_requests_say_what_would_be_right(call: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value) == message


@settings(deadline=None)
@given(st.lists(st.sampled_from([word for word in testbed.VOCABULARY if word != lexicon.UNK]), max_size=30))
def test_render_and_tokenize_are_inverse(tokens: list[str]) -> None:
    assert lexicon.tokenize(lexicon.render(tokens)) == tuple(tokens)
