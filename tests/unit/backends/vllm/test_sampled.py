"""What is looked at in the logits of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from trimtab.backends.vllm.bound import Bound
from trimtab.backends.vllm.sampled import SampledRows
from trimtab.backends.vllm.step import Span, Step
from trimtab.backends.vllm.wire import RequestData

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def request(name: str, number: int, *, check: bool = True, end: int = 4) -> Span:
    """Return the rows of a request of four prompt tokens that end before a position."""
    data = RequestData(label=name, check_logits=check)
    # it got further once, before it was preempted
    return Span(Bound(req_id=name, data=data, prompt_ids=[1, 2, 3, 4], number=number, done=9), 0, 2, end - 2)


def following(*requests: Span) -> tuple[SampledRows, Any]:
    step = Step(16, 16, 1, CPU)
    step.check_logits, step.spans = True, list(requests)
    flags = torch.zeros(17, dtype=torch.bool)
    state = SimpleNamespace(
        step=step,
        banks={},
        recorded=(),
        nonfinite_logits=flags,
        config=SimpleNamespace(keys_per_steering=1),
    )
    return SampledRows(state), state  # type: ignore[arg-type]


def flagged(state: Any) -> set[int]:
    return set(state.nonfinite_logits[1:].nonzero()[:, 0].add(1).tolist())


def test_rows_that_give_no_token_a_probability_are_noted_for_those_who_ask() -> None:
    asks, quiet, inside = request("a", 3), request("b", 5, check=False), request("c", 7, end=3)
    sampled, state = following(asks, quiet, inside)
    names = ["a", "b", "c", "stranger", None]
    sampled.check(torch.zeros(5, 6), names)
    assert not flagged(state)
    for bad in ([0.0, NAN, 1.0], [0.0, INF, 1.0], [-INF, -INF, -INF]):
        sampled.check(torch.tensor([bad] * 5), names)
        assert flagged(state) == {3}, bad
        state.nonfinite_logits[:] = False
    sampled.check(torch.tensor([[-INF, 0.0, -INF]] * 5), names)  # tokens that are left out
    assert not flagged(state)


def test_a_steady_batch_is_looked_at_without_being_read_anew_and_a_changed_one_is_not() -> None:
    first, second = request("a", 2), request("b", 4)
    sampled, state = following(first, second)
    good, bad = [0.0, 1.0], [NAN, 1.0]
    sampled.check(torch.tensor([good, good]), ["a", "b"])
    state.step.shift = 5
    sampled.check(torch.tensor([good, bad]), ["a", "b"])
    assert flagged(state) == {4}
    sampled.check(torch.tensor([bad, good]), ["b", "a"])
    assert flagged(state) == {4}
    sampled.check(torch.tensor([good]), ["a"])
    state.step.spans, state.step.shift = [request("a", 2, end=3)], 0  # its prompt begins again
    sampled.check(torch.tensor([bad]), ["a"])
    assert flagged(state) == {4}


def test_nothing_is_looked_at_where_nobody_asks() -> None:
    sampled, state = following(request("a", 1))
    state.step.check_logits = False
    sampled.check(torch.tensor([[NAN]]), ["a"])
    assert not flagged(state)
