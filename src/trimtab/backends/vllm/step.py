"""The tables of one forward pass: which request each row belongs to, which steering acts on it, how strongly."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from trimtab.backends.vllm import op
from trimtab.backends.vllm.bank import StepRows
from trimtab.backends.vllm.bound import Bound
from trimtab.backends.vllm.kernels import native
from trimtab.errors import BackendError
from trimtab.sites import Site
from trimtab.steering import Positions

Ints = np.ndarray[Any, np.dtype[Any]]
_TOGETHER = 256
"""Taps whose numbers lie in one piece of memory."""


class Span(msgspec.Struct, frozen=True, gc=False):
    """The rows of one request in this pass."""

    bound: Bound
    first: int
    """First row."""
    length: int
    start: int
    """Absolute position of the first row."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows of this pass that are recorded, for the requests that name the same sites."""

    spans: tuple[tuple[Bound, int], ...]
    """Request and how many of its rows, in the order of `rows`."""
    rows: Tensor
    positions: Tensor
    """When the tables were filled; `Step.shift` more in a later pass."""
    edits: frozenset[str]
    """States that some request wants: before the ops of the site, after them."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows of this pass whose full dose is wanted; positions as in `Wanted`."""

    spans: tuple[Span, ...]
    """In the order of `rows`."""
    rows: Tensor
    """On the device of the model."""
    places: Ints
    """The same on the host."""
    gain: Ints
    """float32 [len(rows), keys]."""


class Step:
    """What the taps look at while the model runs.

    Args:
        max_rows: rows that a pass can have.
        max_bound: places of tracked requests; each has two, its number and its `shadow`.
        keys: pairs of positions and gain per steering.
        device: where the tables lie.
    """

    def __init__(self, max_rows: int, max_bound: int, keys: int, device: torch.device) -> None:
        self.device, self._half = device, max_bound // 2
        host = {
            "binding": torch.zeros(max_rows, dtype=torch.int32),
            "slot_of": torch.zeros(max_bound + 1, dtype=torch.int32),
            "gain": torch.full((max_rows, keys), float("nan"), dtype=torch.float32),
        }
        self._host = {name: tensor.numpy() for name, tensor in host.items()}
        self._tensors = host
        # the same tables for single places, quicker to write to than arrays
        self._slot_of: memoryview[int] = self._host["slot_of"].data
        self._binding: memoryview[int] = self._host["binding"].data
        self._gain: memoryview[Any] = self._host["gain"].reshape(-1).data
        # what they hold for rows that nobody tracks
        self._untracked: memoryview[int] = np.zeros_like(self._host["binding"]).data
        self._unselected: memoryview[Any] = self._host["gain"].reshape(-1).copy().data
        self._keys = keys
        on_device = host if device.type == "cpu" else {name: one.to(device) for name, one in host.items()}
        self.rows = StepRows(n=0, **on_device)
        self.control = torch.zeros(8, dtype=torch.int64)
        """What the CPU kernel reads: whether a pass is running that has something to do; its rows; the last tap that
        has something to do; whether full doses are wanted; what the first tap begins the stream with (a handle; 0:
        it has begun)."""
        self._control: memoryview[int] = self.control.numpy().data  # quicker to write to than the array
        self.native = False
        """Whether the CPU kernel runs the taps."""
        self.measured: Measured | None = None
        """Rows whose full dose is wanted."""
        self.shift = 0
        """Passes since the tables were filled: in each, every request has one row, and its position is one more."""
        self._settled = 0  # of these, how many `Bound.done` of the spans counts
        self.busy = False
        """Whether some tap has something to do in a pass with these tables."""
        self.forced = False
        """Whether a request of the batch is forced along given tokens."""
        self.prompt_logits = False
        """Whether a request of the batch has the logits of its prompt recorded."""
        self.check_logits = False
        """Whether a request of the batch is told of logits that are not finite."""
        self.spans: list[Span] = []
        self.special: dict[Site, list[Span]] = {}
        """Requests whose steering at a site has an op outside the banks."""
        self.wanted: dict[Site, Wanted] = {}
        self.token_ids: Tensor | None = None
        """Ids of the rows; on an accelerator None unless a selection names tokens."""
        self._batch: Sequence[str | None] = ()
        self._computed = 0  # rows computed before the pass that comes, if it goes on
        self._steady = False
        self._alike = False  # whether nothing of the requests of the pass changes from row to row
        self._reach = -1  # the last tap where a steering of theirs acts
        self._full = False  # whether one of them wants full doses
        self._filled = 0
        self._taps: list[Ints] = []
        self._owns = torch.zeros(0, 2, dtype=torch.int64)  # what the newest of them have
        self._tap_of: dict[Site, int] = {}
        self._asked: set[int] = set()
        self._ids: tuple[Any, ...] | None = None
        self.table: Tensor | None = None
        """Whose rows the kernel begins the stream with; None: it does not begin it."""
        self._id, self._passes = id(self), op.passes
        weakref.finalize(self, _leave, self._id, self._control)

    @property
    def nbytes(self) -> int:
        """Memory of the tables on the device."""
        return self.rows.binding.nbytes + self.rows.slot_of.nbytes + self.rows.gain.nbytes

    @property
    def active(self) -> bool:
        """Whether a pass is running that has something to do."""
        return self._control[0] != 0

    @active.setter
    def active(self, value: bool) -> None:
        self._control[0] = value
        if value:
            self._passes[self._id] = None
        else:
            self._passes.pop(self._id, None)

    @property
    def last(self) -> int:
        """Number of the last tap that has something to do in this pass."""
        return self._control[2]

    @property
    def quiet(self) -> bool:
        """Whether passes that go on from this one need but `goes_on`: the kernel runs every tap, and ends them."""
        python = self._asked or self.prompt_logits or self.measured is not None
        return self._steady and not python and (self.native or not self.busy)

    def embed(self, ids: Tensor | None, table: Tensor | None) -> None:
        """Have the first tap of each pass begin the stream with rows of a table, in the CPU kernel; None: it has begun.

        Args:
            ids: int32 or int64, of every row of this pass; those of the passes that go on from it begin at the same
                address.
            table: [vocabulary, width] in the model's dtype.
        """
        kernel = native()
        place = (ids.data_ptr(), ids.dtype, ids.is_contiguous()) if ids is not None else None
        if self._control[4] and place == self._ids and table is self.table:
            return  # the kernel has them: how many there are it learns with each pass
        _forget(self._control)
        self.table, self._ids = None, place
        if ids is not None and table is not None and kernel is not None:
            if ids.dtype not in (torch.int32, torch.int64) or not (ids.is_contiguous() and table.is_contiguous()):
                raise BackendError(f"token ids {ids.dtype}: contiguous integers, and a contiguous table, were expected")
            self._control[4], self.table = kernel.lookup(ids, table), table

    def join(self, sites: Iterable[Site]) -> tuple[int, Tensor]:
        """Take up a tap, in the order of a forward pass.

        Returns:
            Its number, and int64 [2]: its calls, and whether a pass needs Python there.
        """
        number = len(self._taps)
        if number % _TOGETHER == 0:
            self._owns = torch.zeros(_TOGETHER, 2, dtype=torch.int64)
        own = self._owns[number % _TOGETHER]
        self._taps.append(own.numpy())
        self._tap_of |= dict.fromkeys(sites, number)
        return number, own

    def reach(self, sites: Iterable[Site]) -> int:
        """Return the last tap among some sites, -1 without one."""
        return max((self._tap_of.get(site, -1) for site in sites), default=-1)

    def slot_of(self, number: int, slot: int) -> None:
        """Say which slot a tracked request uses, and its shadow."""
        shadow = self.shadow(number)
        self._slot_of[number] = self._slot_of[shadow] = slot
        if self.device.type != "cpu":
            self.rows.slot_of[number] = self.rows.slot_of[shadow] = slot
        self._steady = False

    def shadow(self, number: int) -> int:
        """Return a request's second place, for rows computed again after a preemption: steered, and not counted.

        It is far from the first, so that the counters of the requests of a batch share cache lines.
        """
        return number + self._half

    def slot_at(self, number: int) -> int:
        """Return which slot a tracked request uses."""
        return self._slot_of[number]

    def forget(self) -> None:
        """Have the next pass fill the tables anew: the set of requests changes."""
        self.settle()
        self._steady = False

    def settle(self) -> None:
        """Bring `Bound.done` of the requests of the pass up to date."""
        ahead = self.shift - self._settled
        for span in self.spans if ahead else ():
            span.bound.done += ahead
        self._settled = self.shift

    def blank(self) -> None:
        """Let no row be tracked, for passes without tracked requests: device graphs run the taps in them too."""
        self.settle()
        self.rows.binding[: self._filled].zero_()
        self.rows.n = self._filled = 0
        self._clear()
        self._steady = self.busy = self.active = False

    def _clear(self) -> None:
        self.spans, self.special, self.wanted, self.measured = [], {}, {}, None
        self.forced, self.prompt_logits, self.check_logits = False, False, False
        self.shift = self._settled = 0
        self._alike, self._reach, self._full = True, -1, False

    def begin(
        self,
        bound: dict[str, Bound],
        req_ids: Sequence[str | None],
        starts: Ints,
        computed: Ints,
        token_ids: Tensor | None,
    ) -> None:
        """Fill the tables for a pass.

        Args:
            bound: the tracked requests.
            req_ids: requests of the batch, in the order of their rows.
            starts: first row of each request, and the end: int [len(req_ids) + 1].
            computed: rows of each request that were computed before: the position of its first row here.
            token_ids: ids of the rows, for selections that name tokens.
        """
        total, before = starts.item(-1), sum(computed.tolist())
        if self.goes_on(req_ids, total, before):
            return
        self.settle()
        self._fill(bound, req_ids, starts, computed, token_ids, total)
        self._batch, self._computed = list(req_ids), before + total
        self._steady = self._alike and total == len(req_ids)
        self._measure()
        self._direct()

    def goes_on(self, req_ids: Sequence[str | None], rows: int, computed: int) -> bool:
        """Begin a pass that is the one before with one more row of each request; False, nothing done: it is another.

        Args:
            req_ids: requests of the batch, in the order of their rows.
            rows: of the pass.
            computed: rows that were computed before, of all its requests together.
        """
        if not self._steady or computed != self._computed or rows != len(req_ids) or self._batch != req_ids:
            return False
        self._computed = computed + rows
        self.shift += 1
        self._control[0] = self.busy
        return True

    def begin_last(
        self, bound: dict[str, Bound], req_ids: Sequence[str | None], last: Ints, token_ids: Tensor | None
    ) -> None:
        """Fill the tables for one row per request: the last one of each.

        Args:
            bound: the requests whose last row counts.
            req_ids: requests of the batch, in order.
            last: absolute position of the last row of each.
            token_ids: id of the last row of each, for selections that name tokens.
        """
        self.active = True
        starts = np.arange(len(req_ids) + 1)
        before = [(one, one.done, one.counted, one.first, one.skipped) for one in bound.values()]
        for one in bound.values():
            one.done = one.counted  # as it was before this pass, so that the row counts
        self._fill(bound, req_ids, starts, last, token_ids, len(req_ids))
        for one, done, counted, first, skipped in before:
            one.done, one.counted, one.first, one.skipped = done, counted, first, skipped
        self._measure()

    def _fill(
        self,
        bound: dict[str, Bound],
        req_ids: Sequence[str | None],
        starts: Ints,
        computed: Ints,
        token_ids: Tensor | None,
        total: int,
    ) -> None:
        stop = max(total, self._filled)  # rows beyond the batch are padding, and run through the taps in graphs
        self._binding[:stop] = self._untracked[:stop]
        self._gain[: total * self._keys] = self._unselected[: total * self._keys]
        self._clear()
        recorded: dict[frozenset[Site], list[tuple[Span, Tensor]]] = {}
        if token_ids is not None and self.device.type != "cpu":  # waits for the device
            token_ids = token_ids.cpu() if any(one.needs_tokens for one in bound.values()) else None
        self.token_ids = token_ids
        for req_id, (first, last), start in zip(req_ids, pairwise(starts.tolist()), computed.tolist(), strict=True):
            one = bound.get(req_id) if req_id is not None else None
            if one is None:
                continue
            span = Span(one, first, last - first, start)
            if last - first == 1 and one.alike_from <= start == one.done:
                self._place_alike(one, first, start)
            else:
                self._place(span, token_ids)
                self._alike &= start >= max(one.alike_from, one.counted)
            if one.reach > self._reach:
                self._reach = one.reach
            if one.captured is not None:
                self._want(span, token_ids, recorded)
            if one.watched:
                self._watch(one)
            self.spans.append(span)
        self._group(recorded)
        self.rows.n = self._filled = total
        if self.device.type != "cpu":
            for name in ("binding", "gain"):
                getattr(self.rows, name)[:stop].copy_(self._tensors[name][:stop], non_blocking=True)

    def _place(self, span: Span, token_ids: Tensor | None) -> None:
        one, host, first, start = span.bound, self._host, span.first, span.start
        last, stop = first + span.length, start + span.length
        if one.first:
            one.first, one.cached, one.done = False, start, start
            one.foresee()
        elif start > one.done:
            one.skipped = (*one.skipped, (one.done, start))
        one.counted = one.done
        if span.length == 1:  # gains that change at every row come here each time
            self._binding[first] = self.shadow(one.number) if one.done > start else one.number
        else:
            host["binding"][first:last] = one.number
            if one.done > start:
                host["binding"][first : min(first + one.done - start, last)] = self.shadow(one.number)
        if one.table is not None:
            looked_at = token_ids if one.needs_tokens or one.special else None
            one.token_ids = ids = None if looked_at is None else looked_at[first:last]
            gains = one.table.at(start, stop, ids)
            host["gain"][first:last, : gains.shape[1]] = gains
            for site in one.special:
                self.special.setdefault(site, []).append(span)
        one.done = max(one.done, stop)

    def _place_alike(self, one: Bound, row: int, position: int) -> None:
        """Place a request that goes on, with one row: most of a busy engine."""
        one.counted, one.done = position, position + 1
        self._binding[row] = one.number
        if one.table is not None:
            self._gain[row * self._keys : (row + 1) * self._keys] = one.table.wide

    def _watch(self, one: Bound) -> None:
        self.forced |= one.data.forced is not None
        self.check_logits |= one.data.check_logits
        self._full |= one.data.dose == "full"
        self.prompt_logits |= one.data.capture is not None and one.data.capture.prompt_logits

    def _want(
        self, span: Span, token_ids: Tensor | None, recorded: dict[frozenset[Site], list[tuple[Span, Tensor]]]
    ) -> None:
        one = span.bound
        assert one.captured is not None
        if one.captured.needs_tokens:
            ids = None if token_ids is None else token_ids[span.first : span.first + span.length]
            chosen = _chosen(one.captured, span.start, span.length, one.prompt_length, ids)
        else:
            chosen = _chosen_alike(one.captured, span.start, span.length, one.prompt_length)
        if chosen.numel():
            recorded.setdefault(one.capture_sites, []).append((span, chosen))

    def _group(self, recorded: dict[frozenset[Site], list[tuple[Span, Tensor]]]) -> None:
        """Sites that the same requests record share what is said of them."""
        of_site: dict[Site, tuple[frozenset[Site], ...]] = {}
        for sites in recorded:
            for site in sites:
                of_site[site] = (*of_site.get(site, ()), sites)
        made: dict[tuple[frozenset[Site], ...], Wanted] = {}
        for site, groups in of_site.items():
            if groups not in made:
                chosen = [one for group in groups for one in recorded[group]]
                made[groups] = Wanted(
                    tuple((span.bound, places.numel()) for span, places in chosen),
                    torch.cat([places + span.first for span, places in chosen]).to(self.device),
                    torch.cat([places + span.start for span, places in chosen]),
                    frozenset(edit for span, _ in chosen for edit in span.bound.edits),
                )
            self.wanted[site] = made[groups]

    def _measure(self) -> None:
        """Rows that are computed again after a preemption were measured before."""
        spans = []
        for span in self.spans if self._full else ():
            if span.bound.data.dose == "full" and span.bound.counted_ops is not None:
                again = min(max(span.bound.counted - span.start, 0), span.length)
                spans.append(Span(span.bound, span.first + again, span.length - again, span.start + again))
        if spans:
            rows = np.concatenate([np.arange(span.first, span.first + span.length) for span in spans])
            places = torch.from_numpy(rows).to(self.device)
            self.measured = Measured(tuple(spans), places, rows, self._host["gain"][rows])

    def _direct(self) -> None:
        """Say which taps have something to do, and which of them need Python for it."""
        asked = {self._tap_of[site] for site in (*self.wanted, *self.special) if site in self._tap_of}
        for number in self._asked ^ asked:
            self._taps[number][1] = number in asked
        self._asked = asked
        last = max([self._reach, *asked])
        self._control[1], self._control[2], self._control[3] = self.rows.n, last, self.measured is not None
        self.busy = self.active = last >= 0

    def end(self) -> None:
        """Have taps do nothing until the next pass begins; compiled graphs call them still, until `active` is unset.

        In the kernel, the last tap that has something to do ends a pass.
        """
        self._control[0] = 0


def _forget(control: memoryview[int]) -> None:
    kernel = native() if control[4] else None
    if kernel is not None:
        kernel.forget(control[4])
        control[4] = 0


def _leave(number: int, control: memoryview[int]) -> None:
    op.passes.pop(number, None)
    _forget(control)


def _chosen(captured: Positions, start: int, count: int, prompt_length: int, ids: Tensor | None = None) -> Tensor:
    """Return which of `count` rows from a position on are chosen, int64."""
    return captured.mask(torch.arange(start, start + count), prompt_length, ids).nonzero()[:, 0]


_chosen_alike = lru_cache(maxsize=256)(_chosen)
"""For requests of equal lengths; not to be written to."""
