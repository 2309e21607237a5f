"""Keys of KV blocks against a count of rows, and against the hashes of vLLM's own requests."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.backends.vllm import cache_keys
from trimtab.backends.vllm.cache_keys import KeyedOp, block_key, read_ops
from trimtab.errors import PositionError, SteeringError
from trimtab.steering import Constant, Decay, Gain, Positions, Ramp
from trimtab.steering._canonical import gain_json

BLOCK = 4
SPANS = ["all", "prompt", "generated", "last_prompt", "response", "2:5", "0:1", "-3:P", "-2:", "P:P+3", "5:", ":P+1"]
TERMS = [*SPANS, "tokens{1}", "tokens{0,2}", "mask{010110}"]
DROPS = ["!0:1", "!-1:P", "!tokens{1}", "!P+1:", "!1:4", "!3:4,!P:P+1"]
GAINS: list[Gain] = [Constant(1.0), Constant(0.5), Ramp(0.5), Decay(0.5), Decay(0.25), Constant(0.1)]

positions = st.builds(
    lambda kept, dropped: ",".join([*kept, *dropped]),
    st.lists(st.sampled_from(TERMS), min_size=1, max_size=3),
    st.lists(st.sampled_from(DROPS), max_size=2),
)
ops = st.lists(
    st.builds(
        lambda digest, where, gain: KeyedOp(digest, Positions.parse(where), gain),
        st.sampled_from(["a", "b"]),
        positions,
        st.sampled_from(GAINS),
    ),
    max_size=3,
)


def rows(listed: list[KeyedOp], start: int, end: int, prompt_length: int, tokens: list[int]) -> list[list[Any]]:
    """Return per row of the block what happens there, row by row."""
    at = torch.arange(start, end)
    what: list[list[Any]] = [[] for _ in tokens]
    for op in listed:
        gains = op.gain.at((at - prompt_length).clamp_min(0)).tolist()
        chosen = op.positions.mask(at, prompt_length, torch.tensor(tokens)).tolist()
        for row, (hit, gain) in enumerate(zip(chosen, gains, strict=True)):
            if hit:
                what[row].append((op.digest, gain))
    return what


block = st.tuples(ops, st.integers(0, 4).map(lambda n: n * BLOCK), st.integers(1, 14))
tokens = st.lists(st.integers(0, 2), min_size=BLOCK, max_size=BLOCK)


@given(block, block, tokens, tokens)
@settings(max_examples=400, deadline=None)
def test_two_keys_are_equal_exactly_when_every_row_gets_the_same(
    one: tuple[list[KeyedOp], int, int], other: tuple[list[KeyedOp], int, int], first: list[int], second: list[int]
) -> None:
    made, counted = [], []
    for (listed, start, prompt_length), ids in ((one, first), (other, second)):
        counted.append(rows(listed, start, start + BLOCK, prompt_length, ids))
        made.append(block_key(listed, start, start + BLOCK, prompt_length, ids))
    assert (made[0] == made[1]) == (counted[0] == counted[1])
    assert [key is None for key in made] == [not any(what) for what in counted]


@given(ops, st.integers(1, 14), st.lists(st.tuples(st.integers(0, 6), st.sampled_from([4, 8])), max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_blocks_of_a_request_have_the_same_keys_in_any_order(
    listed: list[KeyedOp], prompt_length: int, asked: list[tuple[int, int]]
) -> None:
    ids = [(7 * at) % 3 for at in range(64)]
    keys = cache_keys.BlockKeys(listed, prompt_length)
    for number, size in [*((n, 4) for n in range(7)), *asked]:
        start, end = number * size, (number + 1) * size
        alone = block_key(listed, start, end, prompt_length, ids[start:end])
        assert keys.key(start, end, lambda first=start, last=end: ids[first:last]) == alone  # type: ignore[misc]


@pytest.mark.parametrize(
    ("left", "right", "start", "same"),
    [
        ("all", "prompt", 0, True),
        ("all", "prompt", 4, True),
        ("all", "prompt", 8, False),  # P = 10 lies inside
        ("prompt", "0:10", 8, True),
        ("generated", "10:", 8, True),
        ("response", "generated", 8, False),
        ("all", "all,!tokens{7}", 4, True),  # no such token in the block
        ("all", "tokens{1,2,3}", 0, True),
        ("all", "tokens{1,2}", 0, False),
        ("tokens{1,9}", "tokens{1,2},!tokens{2}", 0, True),  # an exclusion wins
    ],
)
def test_selections_that_act_alike_on_a_block_share_it(left: str, right: str, start: int, same: bool) -> None:
    keys = [
        block_key([KeyedOp("a", Positions.parse(text), Constant())], start, start + 4, 10, [1, 2, 3, 1])
        for text in (left, right)
    ]
    assert (keys[0] == keys[1]) is same
    assert None not in keys


def test_a_gain_over_steps_is_that_of_step_0_in_the_prompt_and_moves_after_it() -> None:
    def key(gain: Gain, start: int) -> str | None:
        return block_key([KeyedOp("a", Positions.parse("all"), gain)], start, start + 4, 8)

    assert key(Decay(0.5), 4) == key(Constant(1.0), 4)
    assert key(Ramp(0.75), 4) == key(Constant(0.25), 4)
    assert key(Decay(0.5), 8) != key(Constant(1.0), 8)
    assert key(Decay(0.5), 8) != key(Decay(0.5), 12)
    assert key(Decay(0.5), 8 + 4 * 999) == key(Constant(0.0), 12)  # underflowed in float32


def test_ops_cut_in_pieces_act_like_the_whole_and_their_order_counts() -> None:
    def key(*listed: tuple[str, str]) -> str | None:
        return block_key([KeyedOp(digest, Positions.parse(text), Constant()) for digest, text in listed], 0, 8, 8)

    assert key(("a", "0:3"), ("a", "3:8")) == key(("a", "all"))
    assert key(("a", "0:3"), ("b", "3:8")) == key(("b", "3:8"), ("a", "0:3"))
    assert key(("a", "all"), ("b", "all")) != key(("b", "all"), ("a", "all"))
    assert key(("a", "all"), ("a", "all")) != key(("a", "all"))


def test_a_selection_by_token_needs_the_tokens() -> None:
    with pytest.raises(PositionError, match="came with 0 token ids"):
        block_key([KeyedOp("a", Positions.parse("tokens{1}"), Constant())], 0, 4, 4)


@pytest.mark.parametrize("listed", [[["a", "all"]], [["a", "all", {"kind": "Wave"}]], 5, [["a", "all", {}]]])
def test_ops_that_cannot_be_read_are_refused(listed: Any) -> None:
    with pytest.raises(SteeringError, match=r"expected \[\[digest, positions, gain\]"):
        read_ops(listed)
    with pytest.raises(SteeringError, match="the ops of a request are"):
        read_ops([["a", "all", {"kind": "Constant", "value": "one"}]])


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"
)


@pytest.fixture
def vllm() -> Iterator[Any]:
    """vLLM's hasher with our keys installed, and put back afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.utils.hashing import sha256
        from vllm.v1.core import block_pool, kv_cache_utils

    stock = kv_cache_utils.generate_block_hash_extra_keys
    kv_cache_utils.init_none_hash(sha256)
    cache_keys.install()
    cache_keys.install()
    yield Vllm(kv_cache_utils, block_pool, sha256)
    for module in (kv_cache_utils, block_pool):
        module.generate_block_hash_extra_keys = stock  # type: ignore[attr-defined]


class Vllm:
    """Makes vLLM's requests."""

    def __init__(self, utils: Any, pool: Any, function: Any) -> None:
        self.utils, self.pool, self.function = utils, pool, function

    def request(self, prompt: list[int], ours: dict[str, Any] | None = None, **other: Any) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=64, extra_args=None if ours is None else {"trimtab": ours})
        hasher = self.utils.get_request_block_hasher(BLOCK, self.function)
        return Request(other.pop("name", "r"), prompt, params, None, block_hasher=hasher, **other)

    def hashes(self, prompt: list[int], ours: dict[str, Any] | None = None, **other: Any) -> list[bytes]:
        return list(self.request(prompt, ours, **other).block_hashes)


def steered(where: str, *, op: str = "a", gain: Gain | None = None, **more: Any) -> dict[str, Any]:
    listed = [[op, where, gain_json(gain or Constant())]]
    return {"v": 2, "id": "x", "steering": {"digest": f"{op}{where}", "ops": json.dumps(listed)}, **more}


def shared(one: list[bytes], other: list[bytes]) -> int:
    """Return how many leading blocks have the same name."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    assert not set(one[count:]) & set(other[count:])
    return count


PROMPT = list(range(100, 110))  # two blocks and a half


@needs_vllm
def test_an_unsteered_request_has_the_stock_hashes(vllm: Any) -> None:
    ours = vllm.utils.generate_block_hash_extra_keys
    stock = ours._trimtab_stock
    assert not hasattr(stock, "_trimtab_stock")  # installed once
    assert vllm.pool.generate_block_hash_extra_keys is ours
    by_hand, parent = [], None
    for start in (0, 4):
        parent = vllm.utils.hash_block_tokens(vllm.function, parent, PROMPT[start : start + 4], None)
        by_hand.append(parent)
    assert vllm.hashes(PROMPT) == by_hand
    assert vllm.hashes(PROMPT, {"v": 2, "id": "x"}) == by_hand
    assert vllm.hashes(PROMPT, steered("generated")) == by_hand
    salted = vllm.request(PROMPT, steered("all"), cache_salt="s")
    assert ours(salted, 0, 4, 0)[0][0] == ("cache_salt", "s")


@needs_vllm
def test_a_second_turn_shares_the_blocks_that_end_before_the_first_steered_row(vllm: Any) -> None:
    turn = vllm.request(PROMPT, steered("generated"))
    for token in range(200, 212):
        turn.append_output_token_ids(token)
    assert len(turn.block_hashes) == 5
    again = [*PROMPT, *range(200, 212)]
    first_steered = len(PROMPT)
    assert shared(turn.block_hashes, vllm.hashes(again)) == first_steered // BLOCK == 2
    assert shared(turn.block_hashes, vllm.hashes(again, steered("generated"))) == 2
    assert shared(turn.block_hashes, vllm.hashes(again, steered("all"))) == 0
    assert shared(turn.block_hashes, vllm.hashes(again, steered("10:22"))) == 5  # steered as turn 1 was
    assert shared(turn.block_hashes, vllm.hashes(again, steered("10:", op="b"))) == 2


@needs_vllm
def test_a_prompt_steered_alike_is_shared_across_steerings(vllm: Any) -> None:
    assert shared(vllm.hashes(PROMPT, steered("all")), vllm.hashes(PROMPT, steered("prompt"))) == 2
    assert shared(vllm.hashes(PROMPT, steered("all")), vllm.hashes(PROMPT)) == 0
    assert shared(vllm.hashes(PROMPT, steered("5:6")), vllm.hashes(PROMPT)) == 1
    assert shared(vllm.hashes(PROMPT, steered("tokens{105}")), vllm.hashes(PROMPT, steered("5:6"))) == 2


@needs_vllm
def test_a_salt_separates_a_request_from_its_first_block_on(vllm: Any) -> None:
    plain = vllm.hashes(PROMPT)
    captured = vllm.hashes(PROMPT, {"v": 2, "id": "x", "salt": "k"})
    assert shared(captured, plain) == 0
    assert captured == vllm.hashes(PROMPT, {"v": 2, "id": "y", "salt": "k"})
    assert shared(captured, vllm.hashes(PROMPT, {"v": 2, "id": "x", "salt": "other"})) == 0
    assert shared(captured, vllm.hashes(PROMPT, steered("all", salt="k"))) == 0
    child = vllm.hashes(PROMPT, {"v": 2, "id": "x", "salt": "k"}, name="1_r")
    assert shared(captured, child) == 0  # the children of one request do not take each other's rows
    request = vllm.request(PROMPT, steered("all", salt="k"))
    events = vllm.utils.to_event_extra_keys(
        [vllm.utils.generate_block_hash_extra_keys(request, at, at + 4, 0)[0] for at in (0, 4)]
    )
    assert [len(one) for one in events] == [2, 1]
    assert events[0] == (events[1][0], "k:r")


@needs_vllm
def test_blocks_that_a_session_hashes_later_are_its_own(vllm: Any) -> None:
    made = []
    for _ in range(2):
        session = vllm.request(PROMPT, steered("generated"), resumable=True)
        session.append_output_token_ids([1] * 6)
        made.append(list(session.block_hashes))
    assert shared(*made) == 2  # the blocks of its first prompt


@needs_vllm
def test_rows_without_tokens_of_their_own_are_keyed_by_the_whole_steering(vllm: Any) -> None:
    embeds = torch.ones(10, 3)
    by_token = [
        vllm.hashes(None, steered(where), prompt_embeds=embeds) for where in ("tokens{5}", "tokens{5}", "tokens{6}")
    ]
    assert by_token[0] == by_token[1]
    assert shared(by_token[0], by_token[2]) == 0
    assert shared(by_token[0], vllm.hashes(None, prompt_embeds=embeds)) == 0
    by_place = [vllm.hashes(None, steered(where), prompt_embeds=embeds) for where in ("all", "prompt")]
    assert by_place[0] == by_place[1]


@needs_vllm
@pytest.mark.parametrize("ours", ["text", {"steering": {"digest": "a"}}, steered("nowhere"), {"steering": 5}])
def test_a_request_that_cannot_be_read_shares_nothing_and_says_so(
    vllm: Any, ours: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert shared(vllm.hashes(PROMPT, ours), vllm.hashes(PROMPT, ours)) == 0
    assert shared(vllm.hashes(PROMPT, ours), vllm.hashes(PROMPT)) == 0
    assert "its steering cannot be read" in caplog.text


@needs_vllm
def test_nothing_else_in_vllm_holds_the_function_by_name() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    holding = {
        ".".join(["vllm", *path.relative_to(root).with_suffix("").parts])
        for path in (root / "v1").rglob("*.py")
        if "generate_block_hash_extra_keys" in path.read_text()
    }
    assert holding == {"vllm.v1.core.kv_cache_utils", *cache_keys._BY_NAME}
