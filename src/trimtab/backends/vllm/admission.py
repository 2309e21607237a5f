"""Admission: at most `max_steering` distinct steerings among the requests that vLLM's scheduler holds.

A request whose steering would be one too many waits outside the scheduler's queues, in the order of arrival, or is
refused. To the engine it is unfinished all the while: it counts as waiting, can be aborted, and ends with the engine.

Who may go first. A request whose steering is active takes no slot, so it never waits for one. But requests that keep
coming would keep their slots for good, and starve the head of the queue. So while the head waits, one active steering,
the one with the fewest requests, takes no new ones: they queue behind the head, which gets the slot that falls free.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable
from typing import Any, NamedTuple

from trimtab._base.log import get_logger
from trimtab.backends.vllm.cache_keys import keys_of
from trimtab.backends.vllm.config import KEY, Policy
from trimtab.backends.vllm.wire import RequestData
from trimtab.errors import BackendError, InputError, TrimtabError
from trimtab.sites import Site

log = get_logger(__name__)
MAX_REASONS = 16384
"""Refused requests of which is kept why."""


class Counts(NamedTuple):
    """How full the slots are."""

    active: int
    """Distinct steerings that hold a slot."""
    waiting: int
    """Requests that wait for one."""
    refused: int
    """Requests refused so far."""


class Admission:
    """Who holds a slot, who waits for one, who was refused; knows requests by id and digest alone.

    Args:
        max_steering: distinct steerings that can be active at once.
        policy: what happens to a request beyond that: "wait" or "refuse".
        known: steerings that the workers can run; a request for another one is refused. None: all are.
    """

    def __init__(self, max_steering: int, policy: Policy = "wait", known: Container[str] | None = None) -> None:
        self._known = known
        self.max_steering = max_steering
        self.policy = policy
        self._digests: dict[str, str] = {}  # active request -> its steering
        self._users: Counter[str] = Counter()  # active steering -> its requests
        self._closing: str | None = None  # the active steering that takes no new requests
        self._waiting: dict[str, tuple[str, list[Any]]] = {}  # in the order of arrival
        self._refused: dict[str, Any] = {}  # until their end is reported
        self._reasons: OrderedDict[str, TrimtabError] = OrderedDict()  # by label, until they are asked for
        self._refusals = 0

    def counts(self) -> Counts:
        """Return how many steerings are active, how many requests wait, and how many were refused."""
        return Counts(len(self._users), len(self._waiting), self._refusals)

    @property
    def outside(self) -> int:
        """Unfinished requests that are not with the scheduler."""
        return len(self._waiting) + len(self._refused)

    def arrive(self, request_id: str, digest: str | None, request: Any) -> bool:
        """Return whether a request goes to the scheduler at once; if not, it is kept here."""
        if request_id in self._waiting:  # a session goes on: its parts wait with the first
            self._waiting[request_id][1].append(request)
            return False
        if digest is not None and self._known is not None and digest not in self._known:
            return self.refuse(
                request_id,
                request,
                BackendError(
                    f"steering {digest[:16]} was never registered with this engine; make requests with "
                    "trimtab.vllm.attach(llm).params(...)"
                ),
            )
        if digest is None or self._admit(request_id, digest):
            return True
        if self.policy == "refuse":
            held = f"other steerings hold all {self.max_steering} slots; raise max_steering, or let requests wait"
            return self.refuse(request_id, request, BackendError(held))
        self._waiting[request_id] = (digest, [request])
        self._close()
        return False

    def refuse(self, request_id: str, request: Any, reason: TrimtabError) -> bool:
        """Keep a request here until its refusal is reported, and why it was refused until somebody asks; False."""
        log.error("request %s is refused: %s", request_id, reason)
        self._refused[request_id] = request
        self._reasons[_label(request) or request_id] = reason
        if len(self._reasons) > MAX_REASONS:
            self._reasons.popitem(last=False)
        self._refusals += 1
        return False

    def take_reasons(self, labels: Iterable[str]) -> dict[str, TrimtabError]:
        """Return why requests were refused, of those that were, by their labels; once."""
        return {label: self._reasons.pop(label) for label in labels if label in self._reasons}

    def users(self, digest: str) -> int:
        """Return how many unfinished requests name a steering."""
        return self._users[digest] + sum(waiting == digest for waiting, _ in self._waiting.values())

    def release(self, request_id: str) -> None:
        """Give up the slot of a request that ended; one that holds none is left alone."""
        digest = self._digests.pop(request_id, None)
        if digest is None:
            return
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest]
            if self._closing == digest:
                self._closing = None

    def take(self) -> list[Any]:
        """Return the requests whose turn has come, in order; they wait no longer and hold their slots."""
        if not self._waiting:
            return []
        ready: list[Any] = []
        for request_id, (digest, requests) in list(self._waiting.items()):
            if self._admit(request_id, digest):
                del self._waiting[request_id]
                ready.extend(requests)
        if ready:
            self._close()
        return ready

    def take_refused(self) -> list[Any]:
        """Return the requests whose refusal is to be reported, once."""
        if not self._refused:
            return []
        refused, self._refused = list(self._refused.values()), {}
        return refused

    def drop(self, request_ids: set[str] | None) -> list[Any]:
        """Return requests that shall be kept here no longer (None: all of them), without a slot."""
        dropped: list[Any] = []
        for name in list(self._waiting) if request_ids is None else request_ids & self._waiting.keys():
            dropped.extend(self._waiting.pop(name)[1])
        for name in list(self._refused) if request_ids is None else request_ids & self._refused.keys():
            dropped.append(self._refused.pop(name))
        self._close()
        return dropped

    def _admit(self, request_id: str, digest: str) -> bool:
        """Take a slot, or share one."""
        if next(iter(self._waiting), request_id) != request_id:  # somebody waits before this one
            if digest not in self._users or digest == self._closing:
                return False
        elif digest not in self._users and len(self._users) >= self.max_steering:
            return False
        self._digests[request_id] = digest
        self._users[digest] += 1
        return True

    def _close(self) -> None:
        """Choose the steering that takes no new requests, so that the head of the queue gets its slot."""
        head = next(iter(self._waiting.values()), None)
        if head is None or head[0] in self._users or len(self._users) < self.max_steering:
            self._closing = None
        elif self._closing is None:
            self._closing = min(self._users, key=lambda digest: self._users[digest])


def install(scheduler: Any, admission: Admission) -> None:
    """Put `admission` before one scheduler, an instance of vLLM's `Scheduler` or of a subclass.

    The instance gets a subclass of its own class. To be called once, before its first request.
    """
    if not hasattr(scheduler, "trimtab_admission"):
        scheduler.trimtab_admission = admission
        vocabulary = scheduler.vllm_config.model_config.get_vocab_size()
        scheduler.__class__ = _admitting(type(scheduler), vocabulary)


def _admitting(stock: Any, vocabulary: int) -> type:
    # of one base only: an instance can change its class only to one of the same memory layout
    class Admitting(stock):  # type: ignore[misc]
        """What changes in a scheduler: a request that is kept outside is not among its `requests`."""

        trimtab_admission: Admission

        def add_request(self, request: Any) -> None:
            name, gate = request.request_id, self.trimtab_admission
            try:
                digest = _digest(request, vocabulary)
            except TrimtabError as problem:
                admitted = gate.refuse(name, request, problem)
            else:
                admitted = name in self.requests or gate.arrive(name, digest, request)
            if admitted:
                stock.add_request(self, request)
            else:
                self.__class__ = Holding

        def _free_request(self, request: Any, delay_free_blocks: bool = False) -> Any:
            freed = stock._free_request(self, request, delay_free_blocks=delay_free_blocks)
            self.trimtab_admission.release(request.request_id)
            return freed

    class Holding(Admitting):
        """The same while requests are kept outside: what it overrides runs at every step, and takes time."""

        def schedule(self, throttle_prefills: bool = False) -> Any:
            for request in self.trimtab_admission.take():
                stock.add_request(self, request)
            self._rest()
            return stock.schedule(self, throttle_prefills)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            for request in self.trimtab_admission.take_refused():
                # the stock method ends the requests of this set with FinishReason.ERROR: added here, they never run
                stock.add_request(self, request)
                self.grammar_compile_error_reqs.add(request.request_id)
            self._rest()
            return stock.update_from_output(self, scheduler_output, model_runner_output)

        def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
            if request_ids is not None:
                request_ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
            for request in self.trimtab_admission.drop(request_ids):
                stock.add_request(self, request)  # what an end sets off (connectors, notices) is the scheduler's to do
            self._rest()
            return stock.finish_requests(self, request_ids, finished_status)

        def get_request_counts(self) -> tuple[int, int]:
            running, waiting = stock.get_request_counts(self)
            return running, waiting + self.trimtab_admission.outside

        def has_finished_requests(self) -> bool:
            if self.finished_req_ids or self.connector is None:
                return bool(self.finished_req_ids)
            return bool(len(self.requests) > sum(stock.get_request_counts(self)))

        def _rest(self) -> None:
            if not self.trimtab_admission.outside:
                self.__class__ = Admitting

    Admitting.__name__ = Admitting.__qualname__ = f"Admitting{stock.__name__}"
    Holding.__name__ = Holding.__qualname__ = f"Holding{stock.__name__}"
    return Admitting


def _digest(request: Any, vocabulary: int) -> str | None:
    """Return the digest of what steers a request, None of an unsteered one.

    Raises:
        TrimtabError: what the request asks for cannot be; in a worker, an exception would end the engine.
    """
    params = request.sampling_params
    try:
        data = RequestData.of(params.extra_args if params is not None else None)
        if data is None:
            return None
        if data.digest is not None:
            keys_of(data.ops, request.num_prompt_tokens)
        for site in data.capture.sites if data.capture is not None else ():
            Site.parse(site)
        data.check(request.num_prompt_tokens, vocabulary)
        return None if data.digest is None else str(data.digest)
    except TrimtabError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise InputError(
            f"extra_args[{KEY!r}] is malformed; make requests with trimtab.vllm.attach(llm).params(...)"
        ) from None


def _label(request: Any) -> str:
    params = getattr(request, "sampling_params", None)
    ours = params.extra_args.get(KEY) if params is not None and params.extra_args else None
    return str(ours.get("id", "")) if isinstance(ours, dict) else ""
