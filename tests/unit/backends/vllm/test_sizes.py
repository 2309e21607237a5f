"""How large the buffers of an engine are made for steerings that are known before it starts."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.backends.vllm.sizes import Sizes
from trimtab.sites import Site
from trimtab.steering import AblateSubspace, Add, CapSubspace, LowRank, Steering

POST = "resid_post"


def add(pattern: str, count: int = 1, positions: str = "all", gain: float = 1.0) -> Steering:
    return Steering({pattern: [Add([1.0, 2.0 + n]) for n in range(count)]}, positions=positions, gain=gain)


@pytest.mark.parametrize(
    ("steering", "ops"),
    [
        (add("embed"), 1),
        (add("layers.*.resid_post", 3), 3),
        (Steering({f"layers.{layer}.resid_post": Add([1.0, 2.0]) for layer in range(40)}), 1),
        (add("layers.0-7.resid_post") + add("layers.4-9.resid_post") + add("layers.8-9.resid_post"), 2),
        (add("layers.{1,5}.resid_post") + add("layers.5.resid_post") + add("layers.*.resid_post"), 3),
        (add("layers.*.resid_post") + add("layers.*.mlp_out"), 1),
        (add("final_norm") + add("layers.3.resid_post") + add("final_norm"), 2),
    ],
)
def test_ops_count_where_they_meet_and_not_where_they_do_not(steering: Steering, ops: int) -> None:
    assert Sizes.of([steering]).ops_per_site == ops


def test_keys_are_pairs_of_positions_and_gain() -> None:
    pairs = [("all", 1.0), ("all", 2.0), ("prompt", 1.0), ("generated", 1.0), ("3:7", 1.0), ("prompt", 1.0)]
    steering = Steering.of(
        bound
        for layer, (rows, gain) in enumerate(pairs)
        for bound in add(f"layers.{layer}.mlp_out", 1, rows, gain).bound
    )
    assert Sizes.of([steering]) == (1, 1, 5)


def test_directions_are_those_that_lie_in_a_bank() -> None:
    three = torch.eye(4)[:3]
    dependent = AblateSubspace([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], keep=0.0)
    outside = LowRank(torch.eye(4), None, torch.eye(4))  # type: ignore[arg-type]
    for op, count in (
        (CapSubspace(three, max=1.0), 3),
        (AblateSubspace(three, keep=0.5), 3),
        (dependent, 2),
        (outside, 1),
        (Add([1.0, 0.0, 0.0, 0.0]), 1),
    ):
        assert Sizes.of([Steering({"embed": op})]).directions_per_op == count


def test_steerings_that_act_together_add_up_where_they_meet() -> None:
    four, two, one = add("layers.3.resid_post", 4), add("layers.*.resid_post", 2, "prompt"), add("layers.5.mlp_out")
    assert Sizes.of([]) == Sizes.of([], together=2) == (1, 1, 1)
    assert Sizes.of([four, two, one]) == (4, 1, 1)
    assert Sizes.of([four, two, one], together=2) == (6, 1, 2)
    assert Sizes.of([four, one], together=2) == (4, 1, 2)
    assert Sizes.of([two, two, two], together=2) == (4, 1, 2)
    assert Sizes.of([four], together=2) == (4, 1, 1)


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), max_size=5))
def test_no_layer_of_any_model_needs_more(spans: list[list[tuple[int, int]]]) -> None:
    steerings = [
        Steering.of(bound for a, b in ranges for bound in add(f"layers.{min(a, b)}-{max(a, b)}.resid_post").bound)
        for ranges in spans
    ]
    needed = [
        sum(sum(bound.pattern.matches(Site(POST, layer=layer)) for bound in one.bound) for one in pair)
        for layer in range(10)
        for pair in (*itertools.combinations(steerings, 2), *((one,) for one in steerings))
    ]
    assert Sizes.of(steerings, together=2).ops_per_site == max(needed, default=1)
