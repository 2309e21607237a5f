"""What travels with a request comes out as it went in, however it travels."""

from __future__ import annotations

import copy
import gc
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.backends.vllm.wire import (
    VERSION,
    CaptureSpec,
    RequestData,
    counts_of,
    counts_text,
    from_bytes,
    from_parcel,
    ops_text,
    positions_of,
    runs,
    to_bytes,
    to_parcel,
)
from trimtab.errors import InputError

words = st.text(max_size=8)
gains = st.sampled_from(['{"kind": "Constant", "value": "0x1.0p+0"}', '{"a": "0x1.8p-1", "kind": "Decay"}'])
captures = st.builds(
    CaptureSpec,
    sites=st.tuples(words, words),
    edit=st.sampled_from([("before",), ("after",), ("before", "after")]),
    positions=words,
    prompt_logits=st.booleans(),
)
requests = st.builds(
    RequestData,
    label=words,
    digest=st.just("d" * 64),
    ops=st.lists(st.tuples(words, words, gains), max_size=3).map(ops_text),
    capture=st.none() | captures,
    forced=st.none() | st.lists(st.integers(0, 1 << 31), max_size=4).map(tuple),
    dose=st.sampled_from(["counts", "full"]),
    salt=st.none() | words,
)


def fields(one: RequestData) -> Any:
    return one.label, one.digest, one.ops, one.capture, one.forced, one.dose, one.salt


@given(requests)
def test_a_request_is_the_same_on_the_other_side(data: RequestData) -> None:
    entry = data.to_wire()
    for travelled in (entry, copy.deepcopy(entry), json.loads(json.dumps(entry)), pickle.loads(pickle.dumps(entry))):
        found = RequestData.of({"trimtab": travelled, "other": 1})
        assert found is not None
        assert fields(found) == fields(data)


def test_a_copy_of_the_parameters_shares_the_entry_and_another_process_gets_plain_data() -> None:
    entry = RequestData(label="a").to_wire()
    assert copy.deepcopy({"x": entry})["x"] is entry
    assert type(pickle.loads(pickle.dumps(entry))) is dict


def test_a_request_without_our_part_is_nobodys() -> None:
    assert RequestData.of(None) is None
    assert RequestData.of({}) is None
    assert RequestData.of({"kv_transfer_params": {}}) is None


@pytest.mark.parametrize(
    "entry", ["name:0.5", 3, [], {}, {"v": VERSION}, {"id": "a"}, {"v": VERSION + 1, "id": "a"}, {"v": None, "id": "a"}]
)
def test_what_another_hand_made_is_refused_in_one_line(entry: Any) -> None:
    with pytest.raises(InputError, match="attach") as refused:
        RequestData.of({"trimtab": entry})
    assert "\n" not in str(refused.value)


@given(
    st.recursive(st.none() | st.integers(-(2**53), 2**53) | words, lambda x: st.lists(x) | st.dictionaries(words, x))
)
def test_documents_travel_as_bytes(document: Any) -> None:
    assert from_bytes(to_bytes(document)) == document


@given(st.dictionaries(words, words, max_size=3), st.lists(st.sampled_from(["float32", "bfloat16"]), max_size=3))
def test_a_parcel_holds_a_document_and_tensors(document: Any, dtypes: list[str]) -> None:
    given = {str(n): torch.arange(3.0 * n).reshape(-1, 3).to(getattr(torch, one)) for n, one in enumerate(dtypes)}
    read, tensors = from_parcel(to_parcel(document, given))
    assert read == document
    assert tensors.keys() == given.keys()
    assert all(torch.equal(tensors[name], one) and tensors[name].dtype == one.dtype for name, one in given.items())


def test_parcels_of_many_lengths_leave_nothing_behind() -> None:
    def make(length: int) -> None:
        given = {"rows": torch.zeros(length, 3), "narrow": torch.zeros(length, 3, dtype=torch.bfloat16)}
        assert len(from_parcel(to_parcel("x" * length, given))[1]) == 2

    make(0)
    gc.collect()
    before = len(gc.get_objects())
    for length in range(1, 300):
        make(length)
    gc.collect()
    assert len(gc.get_objects()) - before < 300


def test_a_document_alone_is_a_parcel_without_tensors() -> None:
    assert from_parcel(to_bytes({"error": "BackendError"})) == ({"error": "BackendError"}, {})
    assert to_parcel({"error": "BackendError"}, {}) == to_bytes({"error": "BackendError"})


@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 4), max_size=5))
def test_counts_travel_as_text(rows: list[tuple[int, ...]]) -> None:
    document = from_bytes(to_bytes(counts_text(np.array(rows, dtype=np.int64).reshape(-1, 4))))
    assert counts_of(document).tolist() == [list(row) for row in rows]


@given(st.lists(st.integers(0, 6), max_size=8))
def test_positions_come_out_of_their_runs_in_their_order(positions: list[int]) -> None:
    assert positions_of(runs(positions)) == tuple(positions)


def test_consecutive_positions_are_one_run() -> None:
    assert runs(range(80, 144)) == [(80, 144)]
    assert runs([0, 1, 5, 6, 6, 9]) == [(0, 2), (5, 7), (6, 7), (9, 10)]
    assert runs([]) == []
