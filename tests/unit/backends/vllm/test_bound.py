"""Tables of gains against the gain of each row by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.backends.vllm.bound import Bound, GainTable
from trimtab.backends.vllm.wire import RequestData
from trimtab.steering import Positions
from trimtab.steering.gains import Constant, Decay, Gain, Ramp

SELECTIONS = ("all", "prompt", "generated", "last_prompt", "2:5", "-3:", "4:", "12:15", "tokens{1,2}", "all,!tokens{2}")
GAINS: tuple[Gain, ...] = (Constant(1.0), Constant(-0.5), Ramp(0.5), Decay(0.9))
keys_of = st.lists(st.tuples(st.sampled_from(SELECTIONS), st.sampled_from(GAINS)), min_size=1, max_size=4)


def alone(key: tuple[str, Gain], position: int, prompt: int, token: int) -> float:
    """Return the gain of one row, NaN where it is not selected."""
    where = torch.tensor([position])
    if not Positions.parse(key[0]).mask(where, prompt, torch.tensor([token])):
        return math.nan
    return float(key[1].at((where - prompt).clamp(min=0)))


@given(keys=keys_of, prompt=st.integers(1, 12), more=st.integers(0, 10), beyond=st.integers(0, 4), data=st.data())
def test_every_row_has_the_gain_of_its_selection(
    keys: list[tuple[str, Gain]], prompt: int, more: int, beyond: int, data: st.DataObject
) -> None:
    length = prompt + more
    ids = data.draw(st.lists(st.integers(0, 3), min_size=length + beyond, max_size=length + beyond))
    table = GainTable.of(tuple((Positions.parse(text), gain) for text, gain in keys), ids[:prompt], length)
    last = length if any(not isinstance(gain, Constant) for _, gain in keys) else length + beyond
    start = data.draw(st.integers(0, last))
    stop = data.draw(st.integers(start, last))
    expected = [[alone(key, row, prompt, ids[row]) for key in keys] for row in range(start, stop)]
    found = table.at(start, stop, torch.tensor(ids[start:stop])) if stop > start else np.empty((0, len(keys)))
    np.testing.assert_array_equal(found, np.array(expected, np.float32).reshape(-1, len(keys)))
    counts = table.selected(start, stop)
    by_token = any(Positions.parse(text).needs_tokens for text, _ in keys)
    assert (counts is None) == (by_token and stop > prompt)
    if counts is not None:
        assert counts.tolist() == [sum(not math.isnan(row[key]) for row in expected) for key in range(len(keys))]
        assert table.selected(start, stop) is counts


def test_a_selection_by_token_says_when_the_tokens_are_missing() -> None:
    table = GainTable.of(((Positions.parse("tokens{1}"), Constant(1.0)),), [1, 2], 8)
    assert np.isnan(table.at(0, 2)).tolist() == [[False], [True]]
    with pytest.raises(AssertionError, match="token ids"):
        table.at(2, 3)


@pytest.mark.parametrize(
    ("selection", "gain", "capture", "steady"),
    [
        ("all", Constant(1.0), None, 0),
        ("2:7", Constant(1.0), None, 7),
        ("generated", Constant(1.0), None, 5),
        ("all", Ramp(0.5), None, 20),  # every row another gain, as far as the sequence may go
        ("tokens{1}", Constant(1.0), None, None),
        ("all", Constant(1.0), "3:9", 9),
        ("all", Constant(1.0), "tokens{1}", None),
    ],
)
def test_when_nothing_changes_from_row_to_row(
    selection: str, gain: Gain, capture: str | None, steady: int | None
) -> None:
    one = Bound(req_id="r", data=RequestData(label="r"), prompt_ids=[0] * 5, number=1)
    one.table = GainTable.of(((Positions.parse(selection), gain),), one.prompt_ids, 20)
    one.captured = None if capture is None else Positions.parse(capture)
    assert one.steady_from() == steady
    assert one.needs_tokens == (steady is None)
