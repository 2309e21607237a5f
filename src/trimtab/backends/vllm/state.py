"""What a worker holds: the banks and tables, the steerings it knows, the requests it tracks, and what they left."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import msgspec
import torch
from torch import Tensor

from trimtab._base.log import get_logger
from trimtab.backends.vllm.bank import SiteBank
from trimtab.backends.vllm.bound import Bound, GainTable, Key
from trimtab.backends.vllm.captured import Recorder
from trimtab.backends.vllm.config import PluginConfig
from trimtab.backends.vllm.counts import Counted, Ints
from trimtab.backends.vllm.doses import DoseRecorder, Doses
from trimtab.backends.vllm.reduced import MAX_DIRECTIONS, Kind, Reduction
from trimtab.backends.vllm.slots import Slots
from trimtab.backends.vllm.step import Step
from trimtab.backends.vllm.wire import CaptureSpec, RequestData
from trimtab.errors import BackendError, SiteError, SteeringError
from trimtab.numerics import dtype_name
from trimtab.sites import Site, SitePattern, nearest
from trimtab.steering import Positions, Steering

if TYPE_CHECKING:
    from trimtab.backends.vllm.taps import VllmMap
    from trimtab.steering import Program

_log = get_logger(__name__)
MAX_LEFT = 16384
"""Finished requests whose results wait to be collected."""
MAX_LEFT_BYTES = 1 << 32
MAX_TABLES, MAX_TABLE_BYTES = 256, 1 << 24
"""Tables of gains that are kept for requests to come, of steerings with the same positions and gains."""


class Left(msgspec.Struct, gc=False):
    """What a finished request leaves until it is collected."""

    label: str
    req_id: str
    digest: str | None
    prompt_length: int
    rows: int
    cached: int
    problems: tuple[str, ...] = ()
    """Why ops did not act where they should have."""
    reduce: Kind = ""
    """What `captured` holds; "": rows."""
    counted: Counted | None = None
    """Its ops that are counted in this worker."""
    counts: Any = None
    """What they did, and how many rows each key selects: what `Counted.values` takes of one request."""
    selected: Ints | None = None
    captured: dict[tuple[Site, str], tuple[Tensor, Tensor]] = {}
    full: list[Doses] = []
    nonfinite_logits: bool = False


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Keys:
    """The pairs of positions and gain of a steering; one for all that have the same."""

    pairs: tuple[Key, ...]
    tables: dict[tuple[int, int], GainTable] = field(default_factory=dict)
    """Gains by the lengths of prompt and sequence, where tokens do not matter."""
    nbytes: int = 0

    def keep(self, lengths: tuple[int, int], table: GainTable) -> None:
        """Keep a table for the requests to come."""
        size = table.rows.nbytes
        if len(self.tables) >= MAX_TABLES or self.nbytes + size > MAX_TABLE_BYTES:
            self.tables.clear()
            self.nbytes = 0
        self.tables[lengths] = table
        self.nbytes += size


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Layout:
    """Where the banks find a steering in `_Known.packed`; one for all steerings that lie alike."""

    starts: dict[int, int]
    """Place of a bank -> first byte of what a slot of it holds; banks of equal ops share them."""


class _Known(msgspec.Struct, frozen=True, gc=False):
    """A steering that requests may name.

    As few objects as can be: many small ones, made between those of requests, would scatter the requests to come over
    the memory, and the scheduler looks at all of them at every step.
    """

    layout: _Layout
    packed: Tensor
    """What slots of the banks hold, each content once: uint8."""
    program: Program | None
    """None where the banks hold all of it."""
    special: tuple[Site, ...]
    """Sites where an op runs outside the banks."""
    keys: _Keys
    counted: Counted
    """Its ops at the sites that this worker holds."""
    reach: int
    """The last tap where it acts."""


class WorkerState:
    """The state of one worker.

    Args:
        config: sizes.
        sites: the map of the model as this worker holds it.
        max_rows: tokens of the largest batch.
        max_requests: requests of the largest batch.
        max_length: longest sequence.
        dtype: dtype of the residual stream.
        device: where the model runs.
        graphs: whether passes are replayed from device graphs, so that nothing but the banks can act.
    """

    def __init__(
        self,
        config: PluginConfig,
        sites: VllmMap,
        *,
        max_rows: int,
        max_requests: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        graphs: bool = False,
    ) -> None:
        self.config, self.map, self.max_length = config, sites, max_length
        self._dtype, self.graphs = dtype, graphs
        every = sites.sites()
        self.steered = resolve(config.sites, every, sites.num_layers)
        self.recorded = tuple(dict.fromkeys((*self.steered, *resolve(config.capture_sites, every, sites.num_layers))))
        self.tap_of = {stage.site: tap for tap in sites.taps(self.recorded) for stage in tap.stages}
        here = {site for site, tap in self.tap_of.items() if not tap.sharded}
        if sites.num_layers - 1 in sites.layers:
            here.add(Site.parse("logits"))
        self._numbers = list(range(2 * max_requests, 0, -1))
        steered = [site for site in self.steered if site in here]
        places = (4 * max_requests + 1, len(steered), config.ops_per_site, 3)
        counts = torch.zeros(places, dtype=torch.int32, device=device)
        self.banks = {
            site: SiteBank(
                site,
                sites.widths(site),
                max_steering=config.max_steering,
                ops_per_site=config.ops_per_site,
                max_directions=config.ops_per_site * config.directions_per_op,
                max_bound=4 * max_requests,
                device=device,
                model_dtype=dtype if site.point != "logits" else torch.float32,
                storage=getattr(torch, config.storage),
                counts=own,
            )
            for site, own in zip(steered, counts.unbind(1), strict=True)
        }
        self._counts: Any = counts.numpy() if device.type == "cpu" else counts
        """[bindings, sites, J, 3]: what the banks count, in their order."""
        self._counted: WeakValueDictionary[Any, Counted] = WeakValueDictionary()
        """One for all steerings whose ops are at the same places, by what it lists."""
        self._keys: WeakValueDictionary[tuple[Key, ...], _Keys] = WeakValueDictionary()
        self.nonfinite_logits = torch.zeros(4 * max_requests + 1, dtype=torch.bool, device=device)
        """Of every binding, whether the logits of a token were not finite, where that is looked for."""
        self._bank_of = {site: index for index, site in enumerate(self.banks)}
        self.step = Step(max_rows, 4 * max_requests, config.keys_per_steering, device)
        over = sites.needs_residual(self.recorded)
        self.residual = torch.zeros(max_rows, sites.hidden_size, dtype=dtype, device=device) if over else None
        offsets = {stage.site: tap.offset for tap in sites.taps(self.recorded) for stage in tap.stages if tap.sharded}
        self.recorder = Recorder(offsets)
        self._directions: OrderedDict[str, Tensor] = OrderedDict()
        self.doses = DoseRecorder(self.banks, max_rows, config.ops_per_site, device)
        self.slots = Slots(config.max_steering)
        self._layouts: WeakValueDictionary[tuple[tuple[int, int], ...], _Layout] = WeakValueDictionary()
        self._holds: dict[int, str] = {}
        """Digest of the steering that the banks hold in a slot."""
        self.bound: dict[str, Bound] = {}
        self._known: dict[str, _Known] = {}
        self.embed: Callable[[Tensor], Tensor] | None = None
        """Gives what is embedded, where that is taken up outside the graph."""
        self.enter: Callable[[Tensor], Tensor] | None = None
        """Gives what enters the first block, of what is embedded, where that is more than the same."""
        self.positions: Tensor | None = None
        """Of the rows of this pass."""
        self.table: Callable[[], Tensor] | None = None
        """Gives the table that it is looked up in, where it is nothing but that."""
        self._left: OrderedDict[str, list[Left]] = OrderedDict()
        self._unread: OrderedDict[str, None] = OrderedDict()
        """Labels of which nothing shall be kept; their requests may not have come yet."""
        self._left_bytes = 0
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Results that were dropped because nobody collected them."""
        return self._dropped

    @property
    def begins(self) -> bool:
        """Whether something is taken up outside the graph when a pass begins."""
        return self.residual is not None or self.embed is not None

    @property
    def nbytes(self) -> int:
        """Memory of the fixed buffers on the model's device."""
        residual = 0 if self.residual is None else self.residual.nbytes
        return residual + self.step.nbytes + self.doses.nbytes + sum(bank.nbytes for bank in self.banks.values())

    # steerings

    def register(self, payload: bytes) -> str:
        """Take a steering in the bytes of a steering file, and return its digest.

        Raises:
            SteeringError: bytes that are no steering, or ops that this engine has no room or no tier for.
            SiteError: a site that the engine was not asked to steer.
            VectorError: a vector of another width than the states at its site.
        """
        if len(payload) > self.config.max_payload_bytes:
            raise SteeringError(
                f"the steering takes {len(payload)} bytes and the engine takes {self.config.max_payload_bytes}; raise "
                "max_payload_bytes where the engine is started"
            )
        steering = Steering.loads(payload, name="the payload")
        digest = steering.digest
        if digest not in self._known:
            self._known[digest] = self._admit(steering)
        return digest

    def bytes_of(self, digest: str) -> int:
        """Return the bytes that are kept on the host to fill slots with a registered steering."""
        return self._known[digest].packed.nbytes

    def _admit(self, steering: Steering) -> _Known:
        fixed = steering.with_model_math(dtype_name(self._dtype))
        program = fixed.resolve(
            num_layers=self.map.num_layers,
            hidden_size=self.map.hidden_size,
            sites=self.map.sites(),
            widths=self.map.widths,
        )
        for site in program:
            tap = self.tap_of.get(site)
            if tap is not None and tap.sharded:
                raise SteeringError(
                    f"{site} is not steered under tensor parallelism: each rank holds {tap.width} of its "
                    f"{self.map.widths(site)} columns, and an op needs whole rows; steer attn_raw, mlp_raw or the "
                    "residual stream, or start the engine with tensor_parallel_size=1"
                )
        missing = [site for site in program if site not in self.steered]
        if missing:
            raise SiteError(
                f"this engine does not steer {missing[0]}: it was started with sites {', '.join(self.config.sites)}; "
                f"add it there. Nearest: {nearest(missing[0], self.steered)}"
            )
        keys: dict[str, int] = {}
        special = []
        for site, steps in program.items():
            for step in steps.steps:
                keys.setdefault(step.key, len(keys))
            outside = [step.name for step in steps.steps if not SiteBank.supports(step.op)]
            if outside and self.graphs:
                raise SteeringError(
                    f"{site}: {', '.join(outside)} cannot run inside device graphs; start the engine with "
                    "enforce_eager=True, which is the tier of Patch and LowRank"
                )
            if outside:
                special.append(site)
        if len(keys) > self.config.keys_per_steering:
            raise SteeringError(
                f"the steering has {len(keys)} different pairs of positions and gain and the engine holds "
                f"{self.config.keys_per_steering}; raise keys_per_steering where the engine is started"
            )
        starts: dict[int, int] = {}
        packed: dict[bytes, tuple[int, Tensor]] = {}
        size = 0
        for place, (site, bank) in enumerate(self.banks.items()):
            if site in program and site not in special:
                record = bank.pack(program[site], keys)
                starts[place], held = packed.setdefault(record.numpy().tobytes(), (size, record))
                size += len(record) if held is record else 0
            elif site in program and len(program[site].steps) > self.config.ops_per_site:
                raise SteeringError(
                    f"{site} has {len(program[site].steps)} ops and the engine holds {self.config.ops_per_site}; raise "
                    "ops_per_site where the engine is started"
                )
        pairs = {step.key: (step.positions, step.gain) for site in program.values() for step in site.steps}
        counted = Counted(
            (self._bank_of[site], site, [(one.name, keys[one.key], SiteBank.supports(one.op)) for one in steps.steps])
            for site, steps in program.items()
            if site in self.banks  # another pipeline stage holds the other layers
        )
        counted = self._counted.setdefault(counted.listed, counted)
        columns = tuple(pairs[key] for key in keys)
        return _Known(
            self._layouts.setdefault(tuple(starts.items()), _Layout(starts)),
            torch.cat([torch.empty(0, dtype=torch.uint8), *(record for _, record in packed.values())]),
            program if special else None,
            tuple(special),
            self._keys.setdefault(columns, _Keys(columns)),
            counted,
            self.step.reach(program),
        )

    def register_directions(self, digest: str, directions: Tensor) -> None:
        """Take directions [k, width] that requests have rows projected on; the least recently used make room."""
        self._directions[digest] = directions.double()
        self._directions.move_to_end(digest)
        while len(self._directions) > MAX_DIRECTIONS:
            self._directions.popitem(last=False)

    def forget(self, digests: Sequence[str]) -> None:
        """Let go of idle steerings.

        Raises:
            BackendError: a request uses one of them.
        """
        for digest in digests:
            slot = self.slots.forget(digest)
            if slot:
                for bank in self.banks.values():
                    bank.clear(slot)
            self._known.pop(digest, None)

    # passes

    def begin(
        self,
        ids: Sequence[str | None],
        starts: Any,
        computed: Any,
        token_ids: Tensor | None,
        embeds: Tensor | None,
        intermediate: Any,
    ) -> None:
        """Fill the tables for a forward pass, and begin the stream: what is embedded, or what another stage sent."""
        self.step.begin(self.bound, ids, starts, computed, token_ids)
        if self.step.busy:
            self.begin_stream(token_ids, embeds, intermediate)

    def begin_stream(self, token_ids: Tensor | None, embeds: Tensor | None, intermediate: Any) -> None:
        """Begin the stream of a pass that `Step.goes_on` began, where the kernel does not (`Step.table`)."""
        if not self.begins:
            return
        if self.table is not None and embeds is None and token_ids is not None and self.step.native:
            self.step.embed(token_ids, self.table())
            return
        count = self.step.rows.n
        if self.embed is not None:
            self.step.embed(None, None)
            embeds = self.embed(token_ids[:count]) if embeds is None and token_ids is not None else embeds
            assert embeds is not None
            rows = embeds[:count]
            if self.enter is not None:
                rows = self.enter(rows)
            if self.residual is not None:
                self.residual[:count].copy_(rows)
        if self.residual is not None and self.map.first_layer_has_residual and intermediate is not None:
            tensors: dict[str, Tensor] = getattr(intermediate, "tensors", intermediate)
            arrived = tensors["hidden_states"][:count]
            if "residual" in tensors:
                arrived = arrived + tensors["residual"][:count]
            self.residual[:count].copy_(arrived)

    # requests

    def bind(self, req_id: str, extra_args: dict[str, Any] | None, prompt_ids: list[int], max_tokens: int) -> None:
        """Track a request that is steered, recorded or forced.

        Raises:
            BackendError: its steering was never registered here.
        """
        data = RequestData.of(extra_args)
        if data is None:
            return
        if not self._numbers:
            raise BackendError("more requests are tracked than the engine has places for; lower max_num_seqs")
        one = Bound(req_id=req_id, data=data, prompt_ids=prompt_ids, number=0)
        if data.capture is not None:
            one.captured = Positions.parse(data.capture.positions)
            one.capture_sites = frozenset(Site.parse(site) for site in data.capture.sites)
            one.edits = data.capture.edit
            self._reduce(one, data.capture)
        if data.digest is not None:
            known = self._known.get(data.digest)
            if known is None:
                raise BackendError(
                    f"request {req_id}: steering {data.digest[:16]} was never registered with this engine"
                )
            self._steer(one, known, max_tokens)
        one.number = self._numbers.pop()  # now that nothing can fail
        self.step.slot_of(one.number, one.slot)
        if one.counted_ops is not None:
            self._counts[one.number] = 0
        if data.check_logits:
            self.nonfinite_logits[one.number] = False
        self.bound[req_id] = one

    def _reduce(self, one: Bound, capture: CaptureSpec) -> None:
        if not capture.reduce:
            return
        directions = self._directions.get(capture.directions)
        if capture.reduce == "projection" and directions is None:
            one.problems.append(f"the directions {capture.directions[:16]} were never registered with this engine")
            one.captured = None
            return
        self.recorder.reduce(one.req_id, Reduction(capture.reduce, directions))

    def _steer(self, one: Bound, known: _Known, max_tokens: int) -> None:
        assert one.data.digest is not None
        one.slot, fresh = self.slots.take(one.data.digest)
        if fresh:
            self._fill(one.slot, known)
            self._holds[one.slot] = one.data.digest
        one.program, one.special = known.program, known.special
        one.counted_ops, one.reach = known.counted, known.reach
        keys = known.keys
        lengths = (one.prompt_length, min(one.prompt_length + max_tokens, self.max_length))
        one.table = keys.tables.get(lengths)
        if one.table is None:
            one.table = GainTable.of(keys.pairs, one.prompt_ids, lengths[1], self.config.keys_per_steering)
            if one.table.tail is not None:
                keys.keep(lengths, one.table)

    def _fill(self, slot: int, known: _Known) -> None:
        """Have a slot of the banks hold a steering."""
        for place, bank in enumerate(self.banks.values()):
            start = known.layout.starts.get(place)
            if start is None:
                bank.clear(slot)
            else:
                bank.put(slot, known.packed[start : start + bank.record])

    def release(self, req_id: str) -> None:
        """Stop tracking a request, and keep what it leaves."""
        one = self.bound.pop(req_id, None)
        if one is None:
            return
        self.step.forget()
        left = self._result(one)
        if left.label not in self._unread:
            self._keep(left)
        if one.data.digest is not None:
            self.slots.give(one.data.digest)
        self.step.slot_of(one.number, 0)
        self._numbers.append(one.number)

    def _result(self, one: Bound) -> Left:
        digest = self._holds.get(self.step.slot_at(one.number))  # by the table that the taps read
        left = Left(one.data.label, one.req_id, digest, one.prompt_length, one.done, one.cached, tuple(one.problems))
        left.reduce = "" if one.data.capture is None else one.data.capture.reduce
        if one.counted_ops is not None:
            counts = self._counts[one.number]
            left.counted = one.counted_ops
            left.counts = counts.cpu().numpy() if isinstance(counts, Tensor) else counts.copy()
            left.selected = one.selected()
        if one.data.capture is not None:
            # where a neighbour in the batch wants both states of a site, both are taken
            held = self.recorder.collect(one.req_id)
            left.captured = {key: rows for key, rows in held.items() if key[1] in one.edits}
            left.problems += tuple(self._unrecorded(one, left.captured))
        if one.data.dose == "full":
            left.full = self.doses.collect(one.req_id)
        left.nonfinite_logits = one.data.check_logits and bool(self.nonfinite_logits[one.number])
        return left

    def _unrecorded(self, one: Bound, captured: Iterable[tuple[Site, str]]) -> Iterator[str]:
        """Yield the sites of this worker of which no row was recorded where some were selected."""
        if one.captured is None or one.captured.needs_tokens:
            return
        found = {site for site, _ in captured}
        lacking = sorted(str(site) for site in one.capture_sites if site in self.tap_of and site not in found)
        if lacking and bool(one.captured.mask(torch.arange(one.cached, one.done), one.prompt_length).any()):
            yield from (f"no row of {site} was recorded, and the request selects some: no tap ran" for site in lacking)

    def _keep(self, left: Left) -> None:
        self._left.setdefault(left.label, []).append(left)
        self._left_bytes += _size(left)
        while len(self._left) > MAX_LEFT or self._left_bytes > MAX_LEFT_BYTES:
            _, gone = self._left.popitem(last=False)
            self._left_bytes -= sum(map(_size, gone))
            self._dropped += len(gone)
            _log.warning("results that nobody collected were dropped: %s", gone[0].label)

    def collect(self, labels: Sequence[str]) -> dict[str, list[Left]]:
        """Return and let go of what requests left; requests still known to the runner are taken as they stand.

        A label that no request had here, or whose results were dropped, is left out: another engine may have it.
        """
        wanted = set(labels)
        for req_id, one in list(self.bound.items()):
            if one.data.label in wanted:
                self.release(req_id)
        found = {}
        for label in labels:
            lefts = self._left.pop(label, None)
            if lefts is not None:
                self._left_bytes -= sum(map(_size, lefts))
                found[label] = lefts
        return found

    def discard(self, labels: Sequence[str]) -> None:
        """Let go of what requests left, or will leave, unread."""
        for label in labels:
            for left in self._left.pop(label, []):
                self._left_bytes -= _size(left)
            self._unread[label] = None
        while len(self._unread) > MAX_LEFT:
            self._unread.popitem(last=False)

    def stats(self) -> dict[str, int]:
        """Return what is held, in numbers."""
        return {
            "registered": len(self._known),
            "registered_bytes": sum(map(self.bytes_of, self._known)),
            "resident": len(self.slots),
            "active": self.slots.active,
            "tracked": len(self.bound),
            "left": len(self._left),
            "left_bytes": self._left_bytes,
            "recorded_bytes": self.recorder.nbytes,
            "dropped": self._dropped,
            "buffer_bytes": self.nbytes,
        }


def resolve(patterns: Sequence[str], existing: Sequence[Site], num_layers: int) -> tuple[Site, ...]:
    """Return the sites of patterns, among those that exist.

    Raises:
        SiteError: a pattern that names none of them; gives the nearest.
    """
    from trimtab.sites import resolve_sites

    points: dict[int, list[str]] = {}
    for site in existing:
        if site.layer is not None:
            points.setdefault(site.layer, []).append(site.point)
    found: list[Site] = []
    for pattern in patterns:
        parsed = SitePattern.parse(pattern)
        if parsed.ranges:
            found.extend(resolve_sites(parsed, num_layers, lambda layer: points.get(layer, [])))
            continue
        (site,) = parsed.resolve(num_layers)
        if site not in existing:
            raise SiteError(f"this model has no {site} in vLLM; nearest: {nearest(site, existing)}")
        found.append(site)
    return tuple(dict.fromkeys(found))


def _size(left: Left) -> int:
    if not left.captured and not left.full:
        return 0
    return sum(rows.nbytes for rows, _ in left.captured.values()) + sum(one.values.nbytes for one in left.full)
