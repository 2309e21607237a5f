"""What a request may say for a steering, and what its strength does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.backends.vllm.server.naming import Term, check_name, read, strengthen
from trimtab.backends.vllm.server.refusal import Refusal
from trimtab.steering import Ablate, Add, Cap, Steering

NAMES = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}", fullmatch=True).filter(lambda name: name != "sha")


@given(st.lists(st.tuples(NAMES, st.floats(-100, 100)), min_size=1, max_size=16, unique_by=lambda one: one[0]))
def test_names_with_strengths_read_back(parts: list[tuple[str, float]]) -> None:
    text = ",".join(f"{name}:{strength!r}" for name, strength in parts)
    assert read(text, max_strength=100) == tuple(Term(name, False, strength) for name, strength in parts)


def test_a_strength_is_one_unless_it_is_given() -> None:
    assert read("a, b:-2 ,sha:0123456789abcdef:.5", max_strength=10) == (
        Term("a", False, 1.0),
        Term("b", False, -2.0),
        Term("0123456789abcdef", True, 0.5),
    )


NO_NUMBERS = ("nan", "inf", "-inf", "1e400", "1_0", "0x10", "", "+", ".", "1e", " 1", "\u0661")
NO_NAMES = ("../a", ".a", "a/b", "a\x00", "\u00e9", "a" * 65, "")
NO_TERMS = ("a:1:2", "sha", "sha:", "sha ", "sha:0123", "sha:XYZ3456789abcdef", "sha:0123456789abcdef:1:2", "a,b,a:2")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((f"a:{bad}", "bad_strength") for bad in (*NO_NUMBERS, "10.0001", "-11", "1e2")),
        *((f"x,{bad}", "bad_name") for bad in NO_NAMES),
        *((bad, "bad_request") for bad in NO_TERMS),
        (",".join(f"n{i}" for i in range(17)), "bad_request"),
        *((bad, "bad_request") for bad in ("", None, 1.5, ["a"], {"v": 2})),
    ],
)
def test_anything_else_is_refused_with_its_reason(text: object, reason: str) -> None:
    with pytest.raises(Refusal) as caught:
        read(text, max_strength=10)
    assert caught.value.reason == reason
    assert caught.value.param == "vllm_xargs.trimtab"
    assert "\n" not in str(caught.value)


@given(st.text(max_size=80))
def test_every_text_is_read_or_refused(text: str) -> None:
    try:
        terms = read(text, max_strength=100)
    except Refusal:
        return
    for term in terms:
        assert math.isfinite(term.strength)
        assert abs(term.strength) <= 100
        assert term.by_digest or check_name(term.key) == term.key


@given(st.floats(-50, 50), st.floats(-3, 3))
def test_the_correction_of_an_add_is_multiplied(strength: float, scale: float) -> None:
    v = torch.tensor([1.0, -2.0, 0.5, 4.0])
    steering = Steering({"layers.1.resid_post": [Add(v, scale=scale)]}, positions="generated", gain=0.5)
    made = strengthen(steering, strength, "a")
    assert made == Steering({"layers.1.resid_post": [Add(v, scale=scale * strength)]}, positions="generated", gain=0.5)


def test_strength_one_is_the_steering_itself_whatever_its_ops() -> None:
    steering = Steering({"embed": [Cap([1.0, 0.0], max=1.0)]})
    assert strengthen(steering, 1.0, "a") is steering


@pytest.mark.parametrize("op", [Cap([1.0, 0.0], max=1.0), Ablate([1.0, 0.0], keep=0.0)])
def test_ops_that_say_where_a_projection_ends_up_take_no_other_strength(op: Cap | Ablate) -> None:
    steering = Steering({"embed": [Add([1.0, 0.0]), op]})
    with pytest.raises(Refusal, match="only Add can be multiplied") as caught:
        strengthen(steering, 0.5, "mixed")
    assert caught.value.reason == "bad_strength"
    assert type(op).__name__ in str(caught.value)


def test_a_scale_that_overflows_is_refused() -> None:
    with pytest.raises(Refusal, match="not finite"):
        strengthen(Steering({"embed": [Add([1.0], scale=1e308)]}), 100.0, "a")
