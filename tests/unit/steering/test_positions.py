"""The positions language against a set of integers computed by hand, and its refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import PositionError
from trimtab.steering import Positions

LENGTH = 24


def rows(text: str, prompt: int, tokens: list[int] | None = None) -> list[int]:
    where = torch.arange(LENGTH)
    ids = None if tokens is None else torch.tensor(tokens)
    return where[Positions.parse(text).mask(where, prompt, ids)].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", range(24)),
        ("prompt", range(10)),
        ("generated", range(10, 24)),
        ("last_prompt", [9]),
        ("response", range(9, 24)),
        ("each_step_last", range(9, 24)),
        ("3:7", range(3, 7)),
        (":4", range(4)),
        ("20:", range(20, 24)),
        ("-4:", range(6, 24)),
        ("-4:P", range(6, 10)),
        ("-4:-1", range(6, 9)),
        ("P:P+2", [10, 11]),
        ("P+3:P+5", [13, 14]),
        ("2:-6", [2, 3]),
        ("prompt,!0:1", range(1, 10)),
        ("all,!last_prompt,!12:", [*range(9), 10, 11]),
        ("1:3,2:5,12:13", [1, 2, 3, 4, 12]),
        ("mask{0110}", [1, 2]),
        ("0:1,2:3,4:5,6:7,8:9,10:11", [0, 2, 4, 6, 8, 10]),
    ],
)
def test_forms_select_these_rows_with_ten_prompt_tokens(text: str, expected: object) -> None:
    assert rows(text, 10) == list(expected)  # type: ignore[call-overload]


def test_token_ids_select_and_exclude_wherever_they_stand() -> None:
    tokens = [5, 7, 5, 1, *([9] * 20)]
    assert rows("tokens{5,1}", 4, tokens) == [0, 2, 3]
    assert rows("prompt,!tokens{5}", 4, tokens) == [1, 3]
    assert rows("tokens{5},P:P+1,!0:1", 4, tokens) == [2, 4]


def test_exclusions_win_whatever_the_order() -> None:
    assert rows("!3:5,prompt", 6) == rows("prompt,!3:5", 6) == [0, 1, 2, 5]


def test_rows_do_not_depend_on_how_a_sequence_is_cut_into_passes() -> None:
    chosen = Positions.parse("-3:,!P+1:P+2")
    whole = chosen.mask(torch.arange(LENGTH), 8)
    for cuts in ([8], [3, 8, 9, 10], list(range(1, LENGTH))):
        parts = [chosen.mask(part, 8) for part in torch.arange(LENGTH).tensor_split(cuts)]
        assert torch.equal(torch.cat(parts), whole)


def test_prompt_lengths_may_differ_per_row_and_padding_is_never_selected() -> None:
    positions = torch.tensor([-1, 0, 1, 2, 0, 1, 2, 3])
    lengths = torch.tensor([2, 2, 2, 2, 3, 3, 3, 3])
    assert Positions.parse("last_prompt").mask(positions, lengths).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert Positions.parse("all").mask(positions, lengths).tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    assert Positions.parse("-2:").mask(positions, lengths).tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
    assert Positions.tokens([3]).mask(positions, lengths, torch.full((8,), 3)).tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


edges = st.one_of(st.integers(0, 30), st.integers(-9, -1), st.integers(0, 9).map(lambda n: f"P+{n}"), st.just("P"))


@st.composite
def texts(draw: st.DrawFn) -> str:
    named = st.sampled_from(["all", "prompt", "generated", "last_prompt", "response", "tokens{3,1}", "mask{101}"])
    ranged = st.tuples(edges, edges).map(lambda pair: f"{pair[0]}:{pair[1]}")
    terms = draw(st.lists(st.tuples(st.sampled_from(["", "!"]), st.one_of(named, ranged)), min_size=1, max_size=7))
    return ",".join(mark + term for mark, term in terms)


def by_hand(text: str, prompt: int, tokens: list[int]) -> list[int]:
    def place(edge: str, default: int) -> int:
        if not edge:
            return default
        if edge[0] == "P":
            return prompt + int(edge[1:] or 0)
        return int(edge) if int(edge) >= 0 else prompt + int(edge)

    def term(one: str) -> set[int]:
        names = {"all": ":", "prompt": ":P", "generated": "P:", "last_prompt": "-1:P", "response": "-1:"}
        if one.startswith("tokens{"):
            ids = set(map(int, one[7:-1].split(",")))
            return {i for i in range(LENGTH) if tokens[i] in ids}
        if one.startswith("mask{"):
            return {i for i, bit in enumerate(one[5:-1]) if bit == "1"}
        first, last = names.get(one, one).split(":")
        return set(range(max(place(first, 0), 0), max(place(last, LENGTH), 0))) & set(range(LENGTH))

    inside: set[int] = set()
    outside: set[int] = set()
    for one in text.replace("tokens{3,1}", "tokens{3;1}").split(","):
        one = one.replace(";", ",")
        (outside if one[0] == "!" else inside).update(term(one.lstrip("!")))
    return sorted(inside - outside)


@given(texts(), st.integers(1, 20))
def test_any_expression_selects_what_a_set_says_and_its_canonical_text_is_the_same(text: str, prompt: int) -> None:
    tokens = [i % 5 for i in range(LENGTH)]
    try:
        parsed = Positions.parse(text)
    except PositionError as error:
        assert "is empty" in str(error) or "select nothing" in str(error)
        return
    expected = by_hand(text, prompt, tokens)
    assert rows(text, prompt, tokens) == expected
    again = Positions.parse(parsed.canonical())
    assert again == parsed
    assert again.canonical() == parsed.canonical()
    assert rows(parsed.canonical(), prompt, tokens) == expected


def test_canonical_text_is_one_for_one_meaning() -> None:
    for first, second in [
        ("5:9,1:3", "1:2, 2:3 ,5:9"),
        ("0:P", "prompt"),
        ("each_step_last", "response"),
        ("tokens{9,2,2}", "tokens{2,9}"),
        ("P-4:P", "-4:P"),
        ("mask{0110}", "1:3"),
        ("all,3:5", "all"),
    ]:
        assert Positions.parse(first).canonical() == Positions.parse(second).canonical()


def test_sequences_are_positions_and_boolean_ones_are_masks() -> None:
    assert Positions.parse([3, 4, 9]).canonical() == "3:5,9:10"
    assert Positions.parse([False, True, True]).canonical() == "1:3"
    assert Positions.parse(torch.tensor([True, False])).canonical() == "0:1"
    assert (Positions.parse("prompt") - Positions.tokens([0])).canonical() == "prompt,!tokens{0}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("last", "no bare 'last'; write last_prompt or each_step_last"),
        ("5", r"write '5:6' for one row, or 'tokens\{5\}'"),
        ("-1", "write 'last_prompt'"),
        ("prompts", "cannot read 'prompts'; write all, prompt"),
        ("", "cannot read ''; write all"),
        ("prompt,,all", "cannot read"),
        ("prompt,", "cannot read"),
        ("!prompt", "write 'all,!prompt'"),
        ("7:3", "is empty: a range is half-open"),
        ("-1:-3", "is empty"),
        ("P3:P4", "write P\\+3"),
        ("1:2:3", "cannot read '1:2:3'"),
        ("a:b", "'a' is not an edge"),
        ("tokens{}", "needs token ids"),
        ("tokens{x}", "needs token ids"),
        ("mask{000}", "at least one 1"),
        ([-1, 2], "absolute positions >= 0"),
        ([], "select nothing"),
        ([1.5], "expected text"),
        ([False, False], "selects nothing"),
    ],
)
def test_a_bad_expression_names_what_would_be_right(given: object, message: str) -> None:
    with pytest.raises(PositionError, match=message):
        Positions.parse(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "prompt", "length", "message"),
    [
        ("-4:", 3, None, "begin 1 before the prompt, which has 3 tokens; use an edge of at least -3"),
        ("2:-4", 5, None, "empty for a prompt of 5 tokens"),
        ("30:40", 5, 20, "begin at 30; the sequence has at most 20 rows"),
        ("P+8:", 5, 10, "begin at 13"),
    ],
)
def test_a_selection_outside_the_sequence_is_refused(text: str, prompt: int, length: int | None, message: str) -> None:
    with pytest.raises(PositionError, match=message):
        Positions.parse(text).check(prompt, length)
    Positions.parse(text).check(50, 100) if text != "2:-4" else None


def test_token_ids_that_were_not_given_are_an_error() -> None:
    with pytest.raises(PositionError, match="no token ids were given"):
        rows("prompt,!tokens{3}", 5)


def test_why_nothing_was_selected() -> None:
    assert Positions.parse("30:40").unfired_reason(5, 20) == "no such row"
    assert Positions.parse("generated").unfired_reason(5, 5) == "no such row"
    assert Positions.parse("tokens{99}").unfired_reason(5, 20) == "never matched"
    assert Positions.parse("prompt,!tokens{99}").unfired_reason(5, 20) == "never matched"
