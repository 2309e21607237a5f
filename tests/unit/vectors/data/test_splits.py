"""Splits share no question, keep their budgets, and count what enters the loss."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import InputError
from trimtab.vectors.data import ContrastData, Example, Splits, split_fractions, split_tokens


def made(questions: int, prompts: int, *, labels: tuple[str, ...] = ("pos", "neg")) -> ContrastData:
    """Every question under several prompts, as the persona sets have them: 240 questions, 5 prompts."""
    examples = [
        Example(text=f"answer {prompt} to {question} {label}", label=label, question=f"q{question}")
        for prompt, question, label in itertools.product(range(prompts), range(questions), labels)
    ]
    return ContrastData(name="made", examples=tuple(examples))


def length(one: Example) -> int:
    return len(one.text.split()) + int(one.question[1:]) % 7


def assert_disjoint(splits: Splits) -> None:
    for a, b in itertools.combinations(splits.parts.values(), 2):
        assert not set(a.questions) & set(b.questions)


def test_questions_that_recur_under_several_prompts_stay_in_one_split() -> None:
    """A split by rows puts the same question in training and test, and so measures what was learned by heart."""
    data = made(24, 5)
    splits = split_fractions(data, {"train": 0.6, "validation": 0.2, "test": 0.2}, seed=1)
    assert_disjoint(splits)
    assert sum(count.examples for count in splits.counts.values()) == len(data)
    assert splits.left.examples == 0
    assert {name: count.questions for name, count in splits.counts.items()} == {"train": 14, "validation": 5, "test": 5}


@given(
    questions=st.integers(3, 30),
    prompts=st.integers(1, 4),
    train=st.integers(40, 400),
    rest=st.integers(40, 200),
    seed=st.integers(0, 5),
)
def test_budgets_are_kept_and_counted(questions: int, prompts: int, train: int, rest: int, seed: int) -> None:
    data = made(questions, prompts)
    try:
        splits = split_tokens(data, {"train": train, "test": rest}, length, seed=seed)
    except InputError as error:
        assert "is empty" in str(error)
        return
    assert_disjoint(splits)
    for name, budget in (("train", train), ("test", rest)):
        assert splits.counts[name].tokens == sum(map(length, splits[name].examples)) <= budget
    total = sum(one.tokens for one in splits.counts.values()) + splits.left.tokens
    assert total == sum(map(length, data.examples))


def test_labels_are_spread_over_splits() -> None:
    """Where each text is a question of its own, a plain shuffle can leave a split with one label."""
    singles = [Example(text=f"t{i}", label="pos" if i < 20 else "neg", question=f"q{i}") for i in range(24)]
    for seed in range(20):
        splits = split_fractions(ContrastData(name="x", examples=tuple(singles)), {"a": 0.5, "b": 0.5}, seed=seed)
        assert all(part.counts == {"neg": 2, "pos": 10} for part in splits.parts.values())


def test_the_seed_decides() -> None:
    data = made(20, 1)
    one, two, other = (split_fractions(data, {"a": 0.5, "b": 0.5}, seed=seed)["a"].questions for seed in (0, 0, 1))
    assert one == two != other


def test_what_cannot_be_split() -> None:
    with pytest.raises(InputError, match="has 2 questions; 3 splits"):
        split_fractions(made(2, 1), {"a": 0.4, "b": 0.3, "c": 0.3})
    with pytest.raises(InputError, match="sum to at most 1"):
        split_fractions(made(9, 1), {"a": 0.9, "b": 0.3})
    with pytest.raises(InputError, match="split 'test' of 50 tokens is empty: no question is left"):
        split_tokens(made(3, 1), {"train": 10**6, "test": 50}, length)
    with pytest.raises(InputError, match="split 'train' of 3 tokens is empty: the smallest of the 3 questions"):
        split_tokens(made(3, 1), {"train": 3}, length)
