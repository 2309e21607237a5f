"""Token agreement against a count by hand, and its sentence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trimtab.workflows._agreement import Tokens, explain, match
from trimtab.workflows._drift import comparable_steps

IDS = st.lists(st.integers(0, 3), max_size=12).map(tuple)


@given(IDS, IDS)
def test_match_agrees_with_a_count_by_hand(reference: tuple[int, ...], candidate: tuple[int, ...]) -> None:
    found = match(reference, candidate)
    same = sum(1 for i in range(min(len(reference), len(candidate))) if reference[i] == candidate[i])
    if reference:
        assert found.ratio == same / len(reference)
    assert found.length_delta == len(candidate) - len(reference)
    if found.first_divergence is None:
        assert reference == candidate
    else:
        at = found.first_divergence
        assert reference[:at] == candidate[:at]
        assert reference[at : at + 1] != candidate[at : at + 1]


def test_under_ninety_percent_is_significant() -> None:
    reference = tuple(range(10))
    assert not match(reference, (*reference[:9], 99)).significant
    assert match(reference, (*reference[:8], 99, 98)).significant


def tokens(ids: tuple[int, ...]) -> Tokens:
    return Tokens(ids, tuple(map(str, ids)), tuple(range(4, 4 + len(ids))), (), ())


@given(IDS, IDS)
def test_a_step_is_comparable_while_all_tokens_before_it_agree(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    steps = comparable_steps(tokens(a), tokens(b))
    assert a[: max(steps - 1, 0)] == b[: max(steps - 1, 0)]
    assert steps <= min(len(a), len(b))
    if steps < min(len(a), len(b)):
        assert a[:steps] != b[:steps]


def test_the_margin_is_the_gap_of_the_two_best() -> None:
    one = Tokens((5,), ("a",), (3,), ((5, 6),), ((-0.5, -0.75),))
    assert one.margin(0) == 0.25
    assert one.margin(1) is None


def test_a_near_tie_and_an_unexplained_divergence_read_differently() -> None:
    found = match((1, 2, 3), (1, 9, 3))
    assert "near tie" in explain(found, 0.01, 1.0, 1e-3, 0.02)
    assert "does not explain it" in explain(found, 2.0, 1.0, 1e-3, 0.02)
    assert explain(match((1,), (1,)), None, None, None, None) == "same tokens throughout"
