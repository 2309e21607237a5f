"""Keys of KV blocks: a block computed under steering is found again only by a request that steers it alike.

vLLM names a block by the hash of its tokens, of the block before it, and of *extra keys*. Here the extra key of a block
is the digest of the steering resolved to the positions of that block: which ops act at which of its rows, in which
order, with which gain. So two steerings that act alike on a block share it, a block without a steered row keeps the
stock key (whatever the request does later), and generated blocks are keyed like those of a prompt. Hashes chain, which
is why one key per block is enough: everything before the block is in the hash of its parent, its absolute position
included, so an op whose effect depends on the absolute position (a `Patch` of several rows) needs nothing more.

Where a key per block cannot be had, the request has one key for all of its blocks (see `_Keys`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

import torch

from trimtab._base.log import get_logger
from trimtab.backends.vllm.config import KEY
from trimtab.errors import PositionError, SteeringError, TrimtabError
from trimtab.steering import Constant, Gain, Positions
from trimtab.steering.gains import KINDS
from trimtab.steering.positions import Range

log = get_logger(__name__)

FORMAT = "trimtab-block-1"
_END = 1 << 62  # beyond every position
_STEPS = 1024  # decode steps whose gains are computed at once
_MARK = "_trimtab_keys"
_BY_NAME = ("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")  # modules that import the function by name

Interval: TypeAlias = tuple[int, int]
Act: TypeAlias = tuple[str, str]
"""(digest of the op, gain as float32 hex): what one op does at a row."""
Segment: TypeAlias = tuple[int, int, tuple[Act, ...]]
"""Rows [start, stop) of a block, counted from its start, and what every one of them gets, in order."""
Extra: TypeAlias = Callable[[Any, int, int, int], tuple[tuple[Any, ...] | None, int]]


class KeyedOp(NamedTuple):
    """One op as a request carries it: the digest of op and site pattern, its rows, its gain."""

    digest: str
    positions: Positions
    gain: Gain


class _Span(NamedTuple):
    """Rows [start, stop) of the sequence that an op selects, where the token of a row lets it."""

    start: int
    stop: int
    fixed: str | None  # the gain, where it is the same at every row
    wanted: frozenset[int] | None  # only these tokens
    unwanted: frozenset[int]  # not these tokens

    @property
    def plain(self) -> bool:
        return self.fixed is not None and self.wanted is None and not self.unwanted


class _Resolved(NamedTuple):
    """Where an op acts in requests of one prompt length; ops of equal positions and gain share one."""

    spans: tuple[_Span, ...]
    stops: tuple[int, ...]
    """The end of every span."""


def read_ops(listed: Any) -> tuple[KeyedOp, ...]:
    """Read the `ops` of a request's steering: `[[digest, positions, gain], ...]`.

    Raises:
        SteeringError: not of that form.
        PositionError: positions that cannot be read.
    """
    try:
        return tuple(KeyedOp(str(digest), Positions.parse(str(where)), _gain(gain)) for digest, where, gain in listed)
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise _malformed(listed) from error
    except ValueError as error:
        if isinstance(error, TrimtabError):
            raise
        raise _malformed(listed) from error


def block_key(
    ops: Sequence[KeyedOp], start: int, end: int, prompt_length: int, token_ids: Sequence[int] = ()
) -> str | None:
    """Return the key of one block.

    Args:
        ops: the ops of the request's steering, in their order.
        start: absolute position of the first row of the block.
        end: absolute position past its last row.
        prompt_length: P.
        token_ids: ids of the tokens of the block [end - start]; read when a selection names token ids.

    Returns:
        BLAKE2b-256 in hex of the canonical JSON of `[[first, last + 1, [[op digest, gain], ...]], ...]`, rows counted
        from the start of the block, gains as float32 hex; None when no row is selected. Two keys are equal exactly
        when every row gets the same ops in the same order with the same gains.
    """
    return BlockKeys(ops, prompt_length).key(start, end, lambda: token_ids)


class BlockKeys:
    """The keys of the blocks of one request: selections resolved once to intervals, never to rows."""

    __slots__ = ("_first", "_known", "_last", "_length", "_ops", "_prompt_length", "needs_tokens")

    def __init__(self, ops: Sequence[KeyedOp], prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self.needs_tokens = any(op.positions.needs_tokens for op in ops)
        """Whether a selection names token ids."""
        resolved = ((op, _resolved(op.positions, op.gain, prompt_length)) for op in ops)
        self._ops = tuple((op, one) for op, one in resolved if one.spans)
        # Rows [first, last) get the same throughout, and a block of `length` rows among them has this key.
        self._first, self._last, self._length = 0, 0, 0
        self._known: str | None = None

    def key(self, start: int, end: int, token_ids: Callable[[], Sequence[int]]) -> str | None:
        """Return the key of the block [start, end); `token_ids` is called when a selection depends on its tokens."""
        if self._first <= start and end <= self._last and end - start == self._length:
            return self._known
        runs: list[tuple[int, int, Act]] = []
        last, even = _END, True
        for op, (spans, stops) in self._ops:
            for index in range(bisect_right(stops, start), len(spans)):
                span = spans[index]
                if span.start >= end:
                    last = min(last, span.start)
                    break
                low, high = max(span.start, start) - start, min(span.stop, end) - start
                if span.plain:
                    assert span.fixed is not None
                    runs.append((low, high, (op.digest, span.fixed)))
                    last, even = min(last, span.stop), even and low == 0 and high == end - start
                else:
                    even = False
                    runs.extend(self._rows(op, span, (low, high), start, _tokens(op, span, end - start, token_ids)))
        if not even:
            return _digest(_segments(runs)) if runs else None
        known = _digest(((0, end - start, tuple(act for _, _, act in runs)),)) if runs else None
        self._first, self._last, self._length, self._known = start, last, end - start, known
        return known

    def _rows(
        self, op: KeyedOp, span: _Span, rows: Interval, start: int, tokens: Sequence[int] | None
    ) -> Iterator[tuple[int, int, Act]]:
        if tokens is not None:
            there = tokens[rows[0] : rows[1]]
            if span.wanted is not None and span.wanted.isdisjoint(there):
                return
            if span.wanted is None and span.unwanted.isdisjoint(there):
                tokens = None
        if tokens is None and span.fixed is not None:
            yield (*rows, (op.digest, span.fixed))
            return
        for row in range(*rows):
            if tokens is None or (
                tokens[row] in span.wanted if span.wanted is not None else tokens[row] not in span.unwanted
            ):
                gain = span.fixed or _gain_at(op.gain, start + row - self._prompt_length)
                yield row, row + 1, (op.digest, gain)


def _tokens(op: KeyedOp, span: _Span, count: int, token_ids: Callable[[], Sequence[int]]) -> Sequence[int] | None:
    if span.wanted is None and not span.unwanted:
        return None
    tokens = token_ids()
    if len(tokens) != count:
        raise PositionError(
            f"positions {op.positions} name token ids; a block of {count} rows came with {len(tokens)} token ids"
        )
    return tokens


def _segments(runs: Sequence[tuple[int, int, Act]]) -> tuple[Segment, ...]:
    """Cut runs that overlap into rows that get the same, as few segments as there can be."""
    cuts = sorted({edge for low, high, _ in runs for edge in (low, high)})
    made: list[Segment] = []
    for low, high in pairwise(cuts):
        acts = tuple(act for first, last, act in runs if first <= low and high <= last)
        if acts and made and made[-1][1] == low and made[-1][2] == acts:
            made[-1] = (made[-1][0], high, acts)
        elif acts:
            made.append((low, high, acts))
    return tuple(made)


@lru_cache(maxsize=4096)
def _digest(segments: tuple[Segment, ...]) -> str:
    document = json.dumps([FORMAT, segments], separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(document.encode(), digest_size=32).hexdigest()


@lru_cache(maxsize=1024)
def _resolved(where: Positions, gain: Gain, prompt_length: int) -> _Resolved:
    spans = tuple(_spans(where, gain, prompt_length))
    return _Resolved(spans, tuple(one.stop for one in spans))


def _spans(where: Positions, gain: Gain, prompt_length: int) -> Iterator[_Span]:
    inside = _union(where.ranges, prompt_length)
    refused = _union(where.not_ranges, prompt_length)
    unwanted = frozenset(where.not_token_ids)
    wanted = frozenset(where.token_ids) - unwanted
    found: list[tuple[int, int, frozenset[int] | None, frozenset[int]]] = [
        (low, high, None, unwanted) for low, high in _less(inside, refused)
    ]
    if wanted:
        outside = _less(_less([(0, _END)], inside), refused)
        found += [(low, high, wanted, frozenset()) for low, high in outside]
    for low, high, chosen, left in sorted(found, key=lambda one: one[0]):
        if isinstance(gain, Constant):
            yield _Span(low, high, _gain_at_first(gain), chosen, left)
            continue
        turn = min(max(prompt_length, low), high)  # in the prompt, a gain is that of step 0
        if low < turn:
            yield _Span(low, turn, _gain_at_first(gain), chosen, left)
        if turn < high:
            yield _Span(turn, high, None, chosen, left)


def _union(ranges: Iterable[Range], prompt_length: int) -> list[Interval]:
    placed = []
    for low, high in ranges:
        first = max(low[1] + prompt_length * low[0], 0)
        last = _END if high is None else high[1] + prompt_length * high[0]
        if first < last:
            placed.append((first, last))
    merged: list[Interval] = []
    for first, last in sorted(placed):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _less(kept: Iterable[Interval], dropped: Sequence[Interval]) -> list[Interval]:
    """Subtract sorted disjoint intervals from sorted disjoint intervals."""
    left: list[Interval] = []
    index = 0
    for low, high in kept:
        while index < len(dropped) and dropped[index][1] <= low:
            index += 1
        at = index
        while at < len(dropped) and dropped[at][0] < high:
            if low < dropped[at][0]:
                left.append((low, dropped[at][0]))
            low = max(low, dropped[at][1])
            at += 1
        if low < high:
            left.append((low, high))
    return left


def _gain_at(gain: Gain, step: int) -> str:
    return _gains(gain, step // _STEPS)[step % _STEPS]


@lru_cache(maxsize=256)
def _gains(gain: Gain, page: int) -> tuple[str, ...]:
    # page by page, so that the gain of a step never depends on the block it was computed for
    steps = torch.arange(page * _STEPS, (page + 1) * _STEPS)
    return tuple(float(value).hex() for value in gain.at(steps).tolist())


@lru_cache(maxsize=256)
def _gain_at_first(gain: Gain) -> str:
    return float(gain.at(torch.zeros(1, dtype=torch.int64))).hex()


def _gain(given: Mapping[str, str]) -> Gain:
    return _gain_of(tuple(sorted(given.items())))


@lru_cache(maxsize=256)
def _gain_of(items: tuple[tuple[str, str], ...]) -> Gain:
    given = dict(items)
    return KINDS[given["kind"]](**{name: float.fromhex(value) for name, value in given.items() if name != "kind"})


@lru_cache(maxsize=256)
def keys_of(ops: str, prompt_length: int) -> BlockKeys:
    """Return the keys that requests of one steering and one prompt length share.

    Args:
        ops: JSON text of [[digest, positions, gain], ...].
        prompt_length: P.

    Raises:
        SteeringError: not of that form.
        PositionError: a selection that such a prompt cannot have.
    """
    read = read_text(ops)
    for op in read:
        op.positions.check(prompt_length)
    return BlockKeys(read, prompt_length)


@lru_cache(maxsize=512)
def read_text(ops: str) -> tuple[KeyedOp, ...]:
    """Read the ops of a request in the form of `wire.ops_text`.

    Raises:
        as `read_ops`.
    """
    try:
        listed = [(str(digest), str(where), dict(gain)) for digest, where, gain in json.loads(ops)]
    except (TypeError, ValueError, AttributeError) as error:
        raise _malformed(ops) from error
    return read_ops(listed)


def _malformed(given: Any) -> SteeringError:
    return SteeringError(f"the ops of a request are {str(given)[:200]!r}; expected [[digest, positions, gain], ...]")


class _Keys:
    """What one request adds to the extra keys of its blocks.

    One key for all blocks, in the place of a key per block:
    - `prompt_embeds` and a selection by token id: the rows have no token of their own; keyed by the steering's digest.
    - steering that cannot be read: keyed by a number of the request's own, so that nothing is shared.
    """

    def __init__(self, request: Any, given: Any) -> None:
        self._salt: str | None = None
        self._whole: str | None = None
        self._blocks: BlockKeys | None = None
        try:
            self._salt, steering = given.get("salt"), given.get("steering")
            if steering is None:
                return
            self._blocks = keys_of(steering["ops"], request.num_prompt_tokens)
            if request.prompt_embeds is not None and self._blocks.needs_tokens:
                self._whole = f"steering:{steering['digest']}"
        except (TrimtabError, AttributeError, TypeError, KeyError) as error:
            log.error("request %s shares no cached block: its steering cannot be read: %s", request.request_id, error)
            self._whole = self._own

    @cached_property
    def _own(self) -> str:
        return f"request:{uuid4().hex}"

    def of(self, request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
        key = self._whole
        if key is None and self._blocks is not None:
            # A session that goes on (`resumable`) makes its output part of the next prompt: rows already computed under
            # one prompt length are hashed under the next. Blocks hashed after its creation are its own.
            key = (
                self._own
                if getattr(request, "resumable", False)
                else self._blocks.key(start, end, lambda: request.all_token_ids[start:end])
            )
        made = () if key is None else (("trimtab", key),)
        if start or not self._salt:
            return made
        return (*made, ("trimtab_salt", f"{self._salt}:{request.request_id}"))  # the children of n > 1 share its salt


def install() -> None:
    """Add our keys to the extra keys of vLLM's blocks; once per process, before its first request.

    A request without `extra_args["trimtab"]` gets what vLLM computes. The key becomes an element `("trimtab", key)`,
    which the events of the KV cache publish as the key alone.
    """
    from vllm.v1.core import kv_cache_utils

    stock: Extra = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(stock, "_trimtab_stock"):
        return
    keyed = _keyed(stock)
    kv_cache_utils.generate_block_hash_extra_keys = keyed  # type: ignore[assignment]
    for name in _BY_NAME:  # they describe blocks in events; a module not imported yet will find ours
        module = sys.modules.get(name)
        if module is not None:
            module.generate_block_hash_extra_keys = keyed  # type: ignore[attr-defined]


def _keyed(stock: Extra) -> Extra:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        found, next_mm_idx = stock(request, start_token_idx, end_token_idx, start_mm_idx)
        params = request.sampling_params
        given = params.extra_args.get(KEY) if params is not None and params.extra_args else None
        if given is None:
            return found, next_mm_idx
        keys = getattr(request, _MARK, None)
        if keys is None:
            keys = _Keys(request, given)
            setattr(request, _MARK, keys)
        ours = keys.of(request, start_token_idx, end_token_idx)
        return ((*(found or ()), *ours) if ours else found), next_mm_idx

    generate_block_hash_extra_keys._trimtab_stock = stock  # type: ignore[attr-defined]
    return generate_block_hash_extra_keys
