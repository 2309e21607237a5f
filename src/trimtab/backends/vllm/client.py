"""The client of a steered engine: steerings registered by content, requests made, doses and rows brought home."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from trimtab import errors
from trimtab.backends.vllm import wire
from trimtab.backends.vllm.config import KEY, REMEDY, asked
from trimtab.backends.vllm.liveness import dead, end_waits_when_dead, has_died, unanswered
from trimtab.backends.vllm.plugin import RPC
from trimtab.backends.vllm.reduced import MAX_DIRECTIONS, Kind
from trimtab.backends.vllm.reports import Part, Report, merged
from trimtab.backends.vllm.wire import CaptureSpec, Dose, RequestData
from trimtab.errors import BackendError, InputError, SteeringError
from trimtab.sites import Site
from trimtab.steering import Positions, Steering

MAX_REGISTERED = 1024
"""Steerings without a name or a request to come that the client keeps registered."""
MAX_MADE = 16384
"""Requests made and not collected whose steerings are kept; as many as a worker keeps results of."""
_FRESH = frozenset({"generated", "response", "last_prompt"})
"""Selections whose rows are computed whatever the prefix cache holds."""
_SETTINGS = frozenset({"sites", "edit", "positions", "prompt_logits", "reduce", "forced", "dose", "check_logits"})
"""What `Client.params` passes on to `Client.extra_args`."""


@dataclass(frozen=True, slots=True)
class Info:
    """What a steered engine says of itself."""

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    widths: Mapping[Site, int]
    steered: tuple[Site, ...]
    recorded: tuple[Site, ...]
    max_steering: int
    max_payload_bytes: int
    buffer_bytes: int
    graphs: bool
    """Whether passes are replayed from device graphs, in which only the banks act: nothing can be recorded there."""


class Client:
    """The client side of a steered engine; see `attach`. Threads may share it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._lock = threading.RLock()
        self._name, self._numbers = uuid.uuid4().hex, count()
        self._registered: OrderedDict[str, str] = OrderedDict()  # -> the ops, as requests carry them
        self._named: dict[str, str] = {}
        self._made: OrderedDict[str, str] = OrderedDict()  # requests made and not collected -> their steering
        self._users: Counter[str] = Counter()  # steering -> such requests
        self._leaving: set[str] = set()
        self._captures: dict[tuple[Any, ...], CaptureSpec] = {}
        self._projected: OrderedDict[str, None] = OrderedDict()
        self._home: dict[str, list[Report]] = {}
        """Reports that came with a call of `collect` that failed for other requests."""
        answers = self._ask("hello")
        first = answers[0]
        reached = Counter(one["engine"] for one in answers)
        for one in answers:
            if reached[one["engine"]] != one["workers"]:
                raise BackendError(
                    f"{reached[one['engine']]} of the {one['workers']} workers of this engine answer this process, and "
                    "rows and doses would be incomplete; start it with distributed_executor_backend 'mp' or 'ray'"
                )
        self.info = Info(
            family=first["family"],
            num_layers=first["num_layers"],
            hidden_size=first["hidden_size"],
            vocab_size=first["vocab_size"],
            widths={Site.parse(site): width for site, width in first["sites"]},
            steered=tuple(Site.parse(site) for site in first["steered"]),
            recorded=tuple(Site.parse(site) for site in first["recorded"]),
            max_steering=first["max_steering"],
            max_payload_bytes=first["max_payload_bytes"],
            buffer_bytes=sum(one["buffer_bytes"] for one in answers),
            graphs=any(one["graphs"] for one in answers),
        )

    def register(self, steering: Steering, name: str = "") -> str:
        """Have every worker know a steering, and return its digest; equal content is sent once.

        Args:
            steering: what requests will name.
            name: by which `params` finds it from now on; a steering that has one stays registered.

        Raises:
            SteeringError: an op that cannot be sent (Edit), a steering over the size limit, or one that does not fit
                the sizes the engine was started with.
            SiteError, VectorError: it does not fit the model, or the engine does not steer there.
        """
        with self._lock:
            digest = self._register(steering)
            if name:
                self._named[name] = digest
        return digest

    def _register(self, steering: Steering) -> str:
        digest = steering.digest
        if digest in self._registered:
            self._registered.move_to_end(digest)
            return digest
        payload = steering.dumps()
        if len(payload) > self.info.max_payload_bytes:
            raise SteeringError(
                f"the steering takes {len(payload)} bytes and the engine takes {self.info.max_payload_bytes}; raise "
                "max_payload_bytes where the engine is started"
            )
        self._ask("register", payload)
        self._registered[digest] = wire.ops_text(steering.identities())
        self._leaving.discard(digest)
        self._trim(digest)
        return digest

    def _trim(self, newest: str) -> None:
        """Forget the oldest of too many steerings that nothing names; requests made may not have reached the engine."""
        if len(self._registered) > MAX_REGISTERED:
            kept = {newest, *self._users, *self._named.values()}
            idle = [digest for digest in self._registered if digest not in kept]
            for digest in idle[: len(self._registered) - MAX_REGISTERED]:
                del self._registered[digest]
                self._leaving.add(digest)
        for digest in list(self._leaving):
            try:
                self._ask("forget", wire.to_bytes({"digests": [digest]}))
            except BackendError:
                continue  # in use: it goes when it is idle. Other engines may have let go of it already
            self._leaving.discard(digest)

    def _use(self, steering: Steering | str | None, label: str) -> tuple[str | None, str]:
        """Return the digest and the ops of a request's steering, registered for as long as the request may come."""
        if steering is None:
            return None, ""
        with self._lock:
            if isinstance(steering, str):
                if steering not in self._named:
                    known = ", ".join(sorted(self._named)) or "none"
                    raise SteeringError(f"no steering is registered as {steering!r}; there are: {known}")
                digest = self._named[steering]
            else:
                digest = self._register(steering)
            self._made[label] = digest
            self._users[digest] += 1
            if len(self._made) > MAX_MADE:
                self._let_go(next(iter(self._made)))
            return digest, self._registered[digest]

    def _let_go(self, label: str) -> None:
        """Note that a request is over: its steering may be forgotten."""
        digest = self._made.pop(label, None)
        if digest is not None:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]

    def extra_args(
        self,
        steering: Steering | str | None = None,
        *,
        sites: Sequence[str] = (),
        edit: Sequence[str] = ("after",),
        positions: str | Positions = "all",
        prompt_logits: bool = False,
        reduce: Literal["", "mean", "statistics"] | Tensor = "",
        forced: Sequence[int] | None = None,
        dose: Dose = "counts",
        check_logits: bool = False,
    ) -> dict[str, Any]:
        """Return `SamplingParams.extra_args` for one request; make a new one for each.

        Args:
            steering: what acts on its rows, or the name by which it was registered.
            sites: site patterns to record.
            edit: "before", "after" or both: the state before the ops of a site, or after them.
            positions: rows to record.
            prompt_logits: whether the site `logits` also has the rows of the prompt before its last token.
            reduce: what comes home instead of the rows: "mean" [1, width]; "statistics" [3, width], per channel the
                mean, the population deviation and the largest magnitude; or directions [k, width], and the rows'
                projections [n, k] do. Sums are float64, results float32.
            forced: token ids to decode along, whatever the model prefers; give max_tokens=len(forced) and
                ignore_eos=True.
            dose: "full" measures every op at every row.
            check_logits: have the report say whether the logits of a token were not finite. Log-probabilities tell it
                too, and cost more.

        Raises:
            as `register`; SteeringError for a name that is not registered; SiteError for a site that the engine does
            not record; InputError for arguments out of their range, those of a recording without sites, and tokens that
            the model does not know.
        """
        capture = None
        for name, value in (("sites", sites), ("edit", edit)):
            if isinstance(value, str):
                raise InputError(f"{name} is the text {value!r}; a tuple was expected: ({value!r},)")
        if sites:
            kind, directions = self._reduction(reduce, sites)
            capture = self._capture(tuple(map(str, sites)), tuple(edit), positions, prompt_logits, kind, directions)
        else:
            _check_idle(edit, positions, prompt_logits, reduce)
        if self.info.graphs and (capture is not None or dose == "full"):
            raise BackendError(
                "rows and full doses cannot be read out of device graphs; start the engine with enforce_eager=True"
            )
        along = None if forced is None else tuple(int(one) for one in forced)
        wire.check_forced(along or (), self.info.vocab_size)
        label = f"{self._name}-{next(self._numbers)}"
        digest, ops = self._use(steering, label)
        fresh = dose == "full" or (capture is not None and capture.positions not in _FRESH)
        data = RequestData(
            label=label,
            digest=digest,
            ops=ops,
            capture=capture,
            forced=along,
            dose=dose,
            check_logits=check_logits,
            salt=label if fresh else None,
        )
        return {KEY: data.to_wire()}

    def _capture(
        self,
        sites: tuple[str, ...],
        edit: tuple[str, ...],
        positions: str | Positions,
        prompt_logits: bool,
        reduce: Kind,
        directions: str,
    ) -> CaptureSpec:
        key = (sites, edit, positions, prompt_logits, reduce, directions)
        found = self._captures.get(key)
        if found is None:
            if len(self._captures) >= MAX_REGISTERED:
                self._captures.clear()
            found = self._captures[key] = CaptureSpec(
                sites=tuple(map(str, self.recorded(sites))),
                edit=edit,
                positions=Positions.parse(positions).canonical(),
                prompt_logits=prompt_logits,
                reduce=reduce,
                directions=directions,
            )
        return found

    def _reduction(self, reduce: str | Tensor, sites: Sequence[str]) -> tuple[Kind, str]:
        if isinstance(reduce, str):
            if reduce not in ("", "mean", "statistics"):
                raise InputError(f"reduce={reduce!r}: 'mean', 'statistics' or directions [k, width] were expected")
            return reduce, ""  # type: ignore[return-value]
        for site in self.recorded(sites):
            if reduce.ndim != 2 or reduce.shape[1] != self.info.widths[site]:
                raise errors.VectorError(
                    f"directions {[*reduce.shape]} cannot be projected on at {site}, whose states have width "
                    f"{self.info.widths[site]}; [k, {self.info.widths[site]}] was expected"
                )
        directions = reduce.detach().float().contiguous().cpu()
        digest = hashlib.blake2b(directions.numpy().tobytes(), digest_size=32).hexdigest()
        with self._lock:
            if digest not in self._projected:
                self._ask("directions", safetensors.torch.save({digest: directions}))
                self._projected[digest] = None
            while len(self._projected) > MAX_DIRECTIONS // 2:  # so that the workers still hold what is asked for
                self._projected.popitem(last=False)
        return "projection", digest

    def params(self, steering: Steering | str | None = None, **settings: Any) -> Any:
        """Return vLLM's `SamplingParams` for one request: settings of `extra_args`, and those of SamplingParams."""
        from vllm.sampling_params import SamplingParams  # vllm's own attribute imports anew at every look

        ours = {name: settings.pop(name) for name in _SETTINGS & settings.keys()}
        if ours.get("forced") is not None:
            settings |= {"max_tokens": len(ours["forced"]), "ignore_eos": True}
        extra = {**(settings.pop("extra_args", None) or {}), **self.extra_args(steering, **ours)}
        if extra.keys() == {KEY}:  # made here, for one request: the engine need not copy it deeply
            settings.setdefault("skip_clone", True)
        return SamplingParams(extra_args=extra, **settings)

    def recorded(self, patterns: Sequence[str]) -> tuple[Site, ...]:
        """Return the sites of patterns, all of which the engine can record.

        Raises:
            SiteError: one that it cannot; names the setting.
        """
        from trimtab.backends.vllm.state import resolve

        found = resolve(patterns, tuple(self.info.widths), self.info.num_layers)
        missing = [site for site in found if site not in self.info.recorded]
        if missing:
            raise errors.SiteError(
                f"this engine does not record {missing[0]}; add it to the sites or capture_sites it is started with"
            )
        return found

    def collect(self, params: Iterable[Any]) -> list[list[Report]]:
        """Bring home what finished requests left: one list per request, one report per child of n > 1.

        Args:
            params: the `SamplingParams` (or extra_args) that the requests were made with.

        Raises:
            BackendError: a request that no engine saw, that runs still, or that was collected before. What came home of
                the others is kept for the next call.
            TrimtabError: a request that was refused; the message says why.
        """
        labels = [self.label(one) for one in params]
        with self._lock:
            self._bring_home(labels)
            found = {label: self._home.pop(label) for label in dict.fromkeys(labels)}
            for label in labels:
                self._let_go(label)
        return [sorted(found[label], key=_by_request) for label in labels]

    def _bring_home(self, labels: Sequence[str]) -> None:
        """Have the reports of some requests in `_home`; raises as `collect`."""
        answers, refused, problems = self._parcels([one for one in labels if one not in self._home])
        ranks = Counter(document["engine"] for document, _ in answers)
        found: dict[tuple[str, str], list[Part]] = {}
        for document, tensors in answers:
            counts, row = wire.counts_of(document["counts"]), 0
            for result in wire.results_of(document):
                names = document["ops"][result.ops]
                part = Part(result, document, tensors, names, counts[row : row + len(names)])
                found.setdefault((result.label, result.req_id), []).append(part)
                row += len(names)
        partial = {label for (label, _), parts in found.items() if _lacks(parts, ranks)}
        for (label, _), parts in found.items():
            if label not in partial:
                self._home.setdefault(label, []).append(merged(parts, self.info.widths))
        missing = [label for label in labels if label not in self._home]
        for label in refused:
            self._let_go(label)
        if refused:
            label, (kind, message) = next(iter(refused.items()))
            which = f"request {labels.index(label) + 1} of {len(labels)}" if len(labels) > 1 else "the request"
            more = f" ({len(refused) - 1} more were refused)" if len(refused) > 1 else ""
            raise _error(kind, f"{which} was refused: {message}{more}")
        if missing and problems:
            raise problems[0]
        if missing:
            dropped = sum(document["dropped"] for document, _ in answers)
            why = f"{dropped} results were dropped uncollected" if dropped else "no request had it"
            where = "in some workers of its engine" if missing[0] in partial else "in any engine"
            raise BackendError(f"{missing[0]!r} is not kept {where}: {why}")

    def discard(self, params: Iterable[Any]) -> None:
        """Let go of what requests left, or will leave."""
        labels = [self.label(one) for one in params]
        with self._lock:
            self._ask("discard", wire.to_bytes({"labels": labels}))
            for label in labels:
                self._home.pop(label, None)
                self._let_go(label)

    def stats(self) -> list[dict[str, Any]]:
        """Return what each worker holds, in numbers."""
        return self._ask("stats")

    @staticmethod
    def label(params: Any) -> str:
        """Return the name under which a request is kept.

        Raises:
            InputError: it was not made by this client.
        """
        data = RequestData.of(params.extra_args if hasattr(params, "extra_args") else params)
        if data is None:
            raise InputError("the request carries no trimtab entry; make it with params(...) of the attached client")
        return data.label

    def _raw(self, verb: str, payload: bytes) -> list[bytes]:
        engine = getattr(self._engine, "llm_engine", self._engine)
        if has_died(engine):
            raise dead()
        try:
            return [bytes(one) for one in self._engine.collective_rpc(RPC, args=(verb, payload))]
        except errors.TrimtabError:
            raise
        except Exception as error:
            remedy = "start it again"
            if verb == "hello":
                remedy = "is trimtab installed where its workers run, and does VLLM_PLUGINS, if set, name it?"
            raise unanswered(engine, verb, error, remedy) from error

    def _ask(self, verb: str, payload: bytes = b"") -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [wire.from_bytes(one) for one in self._raw(verb, payload)]
        for one in answers:
            _raise(one)
        return answers

    def _parcels(
        self, labels: Sequence[str]
    ) -> tuple[list[tuple[dict[str, Any], dict[str, Tensor]]], dict[str, tuple[str, str]], list[errors.TrimtabError]]:
        """Return what workers hold of requests, why some were refused, and what engines answered instead."""
        found, problems = [], []
        refused: dict[str, tuple[str, str]] = {}
        for data in self._raw("collect", wire.to_bytes({"labels": labels})):
            document, tensors = wire.from_parcel(data)
            if "error" in document:
                problems.append(_error(document["error"], document["message"]))
            elif "refused" in document:
                refused |= {label: (kind, message) for label, (kind, message) in document["refused"].items()}
            else:
                document["ops"] = [tuple((site, op) for site, op in one) for one in document["ops"]]
                document["positions"] = [wire.positions_of(one) for one in document["positions"]]
                found.append((document, tensors))
        return found, refused, problems


def attach(llm: Any) -> Client:
    """Bind to an engine that was started with steering.

    Args:
        llm: a `vllm.LLM` or an `LLMEngine`.

    Raises:
        BackendError: the engine was started without it; the message says how to start it.
    """
    engine = getattr(llm, "llm_engine", llm)
    config = getattr(engine, "vllm_config", None)
    if config is None:
        raise InputError(f"attach takes a vllm.LLM or its engine; got a {type(llm).__name__}")
    if asked(config) is None:
        raise BackendError(f"this engine was started without steering; {REMEDY}")
    end_waits_when_dead(engine)
    return Client(llm if hasattr(llm, "collective_rpc") else engine)


def _check_idle(edit: Sequence[str], positions: str | Positions, prompt_logits: bool, reduce: str | Tensor) -> None:
    """Refuse what only says how sites are recorded, where none are."""
    for name, given in (
        ("edit", tuple(edit) != ("after",)),
        ("positions", positions != "all"),
        ("prompt_logits", prompt_logits),
        ("reduce", isinstance(reduce, Tensor) or bool(reduce)),
    ):
        if given:
            raise InputError(
                f"{name} was given without sites, and says how these are recorded; give sites too (the positions of an "
                "op are its steering's)"
            )


_by_request = attrgetter("request_id")


def _lacks(parts: Sequence[Part], ranks: Counter[int]) -> bool:
    """Whether some workers of an engine have nothing of a request that others of it have."""
    if len(parts) == ranks.total():
        return False
    return any(ranks[engine] != count for engine, count in Counter(one.document["engine"] for one in parts).items())


def _raise(answer: dict[str, Any]) -> None:
    if "error" in answer:
        raise _error(answer["error"], answer["message"])


def _error(kind: str, message: str) -> errors.TrimtabError:
    made: errors.TrimtabError = getattr(errors, kind, BackendError)(message)
    return made
