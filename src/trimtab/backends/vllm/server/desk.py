"""The desk of a server: reads what a request asks for, has the engine know it in time, and brings the doses home."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from trimtab._base.log import get_logger
from trimtab.backends.vllm import wire
from trimtab.backends.vllm.client import Client
from trimtab.backends.vllm.config import KEY, Policy
from trimtab.backends.vllm.reports import Report
from trimtab.backends.vllm.server import doses
from trimtab.backends.vllm.server.naming import PARAM, read, strengthen
from trimtab.backends.vllm.server.refusal import Refusal, with_options
from trimtab.backends.vllm.wire import RequestData
from trimtab.errors import BackendError, InputError, PositionError, TrimtabError
from trimtab.steering import Steering

if TYPE_CHECKING:
    from trimtab.backends.vllm.asynchronous import Workers
    from trimtab.backends.vllm.server.metrics import Metrics
    from trimtab.backends.vllm.server.store import Store, Stored

_log = get_logger(__name__)
MAX_REGISTERED = 1024
"""Distinct steerings that the engine is made to hold while they are idle."""
MAX_IDLE_BYTES = 1 << 30
"""Bytes of them in a worker: every strength is a steering of its own, with its own copy of the vectors here and, as
large as a slot, in each worker."""
MAX_IN_FLIGHT = 4096
"""Distinct steerings of requests in flight."""

_Key = tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one text asks for, ready for the engine."""

    steering: Steering
    digest: str
    ops: str
    names: tuple[str, ...]
    owners: doses.Owners
    """Site -> per op, in order, where it comes from."""
    selections: tuple[doses.Owner, ...]
    """The rows that its ops select, each selection once."""


@dataclass(slots=True)
class Turn:
    """One HTTP request that is steered."""

    text: str
    plan: Plan
    ledger: doses.Ledger = field(default_factory=doses.Ledger)


class Desk:
    """Who is steered by what.

    All methods run on the event loop of the server.

    Args:
        workers: the engine's workers.
        client: their client.
        store: steerings by name.
        metrics: what is counted.
        max_strength: largest magnitude of a strength.
        when_full: what the engine does with a request that finds every slot taken.
    """

    def __init__(
        self,
        workers: Workers,
        client: Client,
        store: Store,
        metrics: Metrics,
        *,
        max_strength: float,
        when_full: Policy = "wait",
    ) -> None:
        self._workers, self._client, self.store, self.metrics = workers, client, store, metrics
        self._max_strength, self.when_full = max_strength, when_full
        self._plans: OrderedDict[_Key, Plan] = OrderedDict()
        self._registered: OrderedDict[str, int] = OrderedDict()  # -> bytes; the least recently used first
        self._leaving: set[str] = set()
        self._in_flight: Counter[str] = Counter()
        self._registering = asyncio.Lock()
        self._waiting: dict[str, asyncio.Future[list[Report]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.stored.set_function(lambda: len(store))
        metrics.registered.set_function(lambda: len(self._registered))
        metrics.active.set_function(lambda: len(self._in_flight))

    async def check_stored(self) -> None:
        """Have the engine look at every stored steering.

        Raises:
            InputError: one that does not fit the model, or the sizes that the engine was started with.
        """
        for one in self.store.listed():
            try:
                await self.admit(one.name, one.steering)
            except Refusal as error:
                raise InputError(f"{self.store.directory}: {error}") from error

    async def prepare(self, text: object) -> Turn:
        """Read a request's steering, and have the engine know it; `release` the turn when the request has ended.

        Raises:
            Refusal: it cannot be read, names what does not exist, or does not fit.
        """
        terms = read(text, max_strength=self._max_strength)
        parts = [(self.store.find(term), term.strength) for term in terms]
        key = tuple((one.name, one.digest, strength) for one, strength in parts)
        plan = self._plans.get(key)
        if plan is None:
            plan = await self._plan(parts)
            self._plans[key] = plan
            if len(self._plans) > MAX_REGISTERED:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        if plan.digest not in self._in_flight and len(self._in_flight) >= MAX_IN_FLIGHT:
            raise Refusal(
                f"requests with {MAX_IN_FLIGHT} different steerings are in flight; try again later",
                reason="bad_request",
                status=503,
            )
        turn = self.again(Turn(str(text), plan))
        try:
            await self._register(plan.digest, plan.steering)
        except BaseException as error:
            self.release(turn)
            self._plans.pop(key, None)
            if isinstance(error, TrimtabError):
                raise _unfit(str(text), error) from error
            raise
        for name in plan.names:
            self.metrics.requests.labels(name).inc()
        return turn

    def again(self, turn: Turn) -> Turn:
        """Hold a turn once more: its steering stays with the engine until as many calls of `release`."""
        self._in_flight[turn.plan.digest] += 1
        return turn

    def release(self, turn: Turn) -> None:
        """Let go of a turn."""
        self._in_flight[turn.plan.digest] -= 1
        if self._in_flight[turn.plan.digest] <= 0:
            del self._in_flight[turn.plan.digest]

    async def admit(self, name: str, steering: Steering) -> None:
        """Have the engine look at a steering.

        Raises:
            Refusal: it does not fit.
        """
        try:
            await self._register(steering.digest, steering)
        except TrimtabError as error:
            raise _unfit(name, error) from error

    def check_prompt(self, turn: Turn, length: int) -> None:
        """Look whether the rows that a steering selects can be met in a prompt.

        Raises:
            Refusal: a selection begins before the prompt, or is empty for it.
        """
        for name, positions in turn.plan.selections:
            try:
                positions.check(length)
            except PositionError as error:
                raise Refusal(f"{name}: {error}", reason="outside_prompt", param=PARAM) from error

    def full(self) -> Refusal:
        """Return the refusal of a request that the engine turned down."""
        return Refusal(
            f"other steerings hold all {self._client.info.max_steering} places of this server (--max-steering); try "
            "again later",
            reason="full",
            status=503,
        )

    def refuse(self, refusal: Refusal) -> None:
        """Count a refusal."""
        self.metrics.refusals.labels(refusal.reason).inc()

    async def collect(self, turn: Turn, label: str, prompt_ids: Sequence[int]) -> None:
        """Bring home what one finished engine request left; what cannot be had is counted, and never an error."""
        future: asyncio.Future[list[Report]] = asyncio.get_running_loop().create_future()
        self._waiting[label] = future
        if len(self._waiting) == 1:
            self._spawn(self._collect_waiting())
        try:
            reports = await future
        except TrimtabError as error:
            _log.warning("the doses of a request are lost: %s", error)
            self.metrics.lost.inc()
            turn.ledger.lost += 1
            return
        for row in turn.ledger.add(turn.plan.owners, reports, prompt_ids):
            self.metrics.dose_rows.labels(row.steering).inc(row.rows)
            if row.nonfinite:
                self.metrics.nonfinite.labels(row.steering).inc(row.nonfinite)
            if row.unfired:
                self.metrics.unfired.labels(row.steering).inc()

    def abandon(self, label: str) -> None:
        """Let go of what an engine request left that ended early; it may never have begun."""
        self._spawn(self._drop(label))

    # machinery

    async def _plan(self, parts: Sequence[tuple[Stored, float]]) -> Plan:
        info = self._client.info

        def make() -> Plan:
            scaled = [(one.name, strengthen(one.steering, strength, one.name)) for one, strength in parts]
            whole = Steering.of([bound for _, steering in scaled for bound in steering.bound])
            owners: doses.Owners = {}
            for name, steering in scaled:
                program = steering.resolve(
                    num_layers=info.num_layers,
                    hidden_size=info.hidden_size,
                    sites=info.widths,
                    widths=info.widths.get,
                )
                for site, one in program.items():
                    there = owners.setdefault(str(site), [])
                    there.extend(doses.Owner(name, step.positions) for step in one.steps)
            return Plan(
                whole,
                whole.digest,
                wire.ops_text(whole.identities()),
                tuple(name for name, _ in scaled),
                owners,
                tuple(dict.fromkeys(chain.from_iterable(owners.values()))),
            )

        try:
            return await asyncio.to_thread(make)
        except TrimtabError as error:
            raise Refusal(str(error), reason="does_not_fit", param=PARAM) from error

    async def _register(self, digest: str, steering: Steering) -> None:
        if digest in self._registered:
            self._registered.move_to_end(digest)
            return
        async with self._registering:
            if digest in self._registered:
                return
            payload = await asyncio.to_thread(steering.dumps)
            limit = self._client.info.max_payload_bytes
            if len(payload) > limit:
                raise InputError(
                    f"it takes {len(payload)} bytes and the engine takes {limit}; start it with "
                    f"max_payload_bytes={len(payload)}"
                )
            answers = await self._workers.ask("register", payload)
            self._registered[digest] = max(len(payload), *(one["bytes"] for one in answers))
            self._leaving.discard(digest)
            await self._forget_idle()

    async def _forget_idle(self) -> None:
        """Keep what the engine and the plans hold bounded; one in flight stays, its request may not have begun."""
        idle = {digest: size for digest, size in self._registered.items() if digest not in self._in_flight}
        excess, nbytes = len(self._registered) - MAX_REGISTERED, sum(idle.values())
        for digest, size in idle.items():
            if excess <= 0 and nbytes <= MAX_IDLE_BYTES:
                break
            excess, nbytes = excess - 1, nbytes - size
            del self._registered[digest]
            self._leaving.add(digest)
        for key in [key for key, plan in self._plans.items() if plan.digest in self._leaving]:
            del self._plans[key]
        for digest in list(self._leaving):
            try:
                await self._workers.ask("forget", wire.to_bytes({"digests": [digest]}))
            except BackendError:
                continue  # a request holds it to the end of its step; other engines may have let go of it
            self._leaving.discard(digest)

    async def _collect_waiting(self) -> None:
        """Collect for all that wait, in one call; those that come meanwhile go with the next one."""
        while self._waiting:
            batch = dict(self._waiting)
            labels = list(batch)
            try:
                found = await self._ask_reports(labels)
                outcomes: list[list[Report] | Exception] = list(found)
            except TrimtabError as error:
                outcomes = [error] if len(labels) == 1 else [await self._one(label) for label in labels]
            except Exception as error:  # the engine died: every one that waits must learn of it
                outcomes = [BackendError(f"the engine did not answer: {error}")] * len(labels)
            for label, outcome in zip(labels, outcomes, strict=True):
                del self._waiting[label]
                future = batch[label]
                if future.done():
                    continue  # its sender has gone
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    async def _one(self, label: str) -> list[Report] | Exception:
        try:
            (found,) = await self._ask_reports([label])
        except TrimtabError as error:
            return error
        return found

    async def _ask_reports(self, labels: Sequence[str]) -> list[list[Report]]:
        made = [{KEY: RequestData(label=label).to_wire()} for label in labels]
        return await asyncio.to_thread(self._client.collect, made)

    async def _drop(self, label: str) -> None:
        try:
            await self._ask_reports([label])
        except TrimtabError as error:
            _log.debug("a request that ended early left nothing: %s", error)

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _unfit(name: str, error: TrimtabError) -> Refusal:
    """Return the refusal of a steering that the engine did not take: the sender's fault, unless the engine is ill."""
    status = 503 if isinstance(error, BackendError) else 400
    return Refusal(f"{name}: {with_options(str(error))}", reason="does_not_fit", status=status, param=PARAM)
