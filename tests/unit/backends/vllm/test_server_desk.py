"""The layer before vLLM's routes, with an application and workers of our own behind it."""

from __future__ import annotations

import asyncio
import hmac
import importlib.util
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.backends.vllm import wire
from trimtab.backends.vllm.counts import OpReport
from trimtab.backends.vllm.reports import Report
from trimtab.backends.vllm.server import desk as desks
from trimtab.backends.vllm.server import engine as engines
from trimtab.backends.vllm.server.admin import Admin
from trimtab.backends.vllm.server.desk import Desk
from trimtab.backends.vllm.server.http import SLACK, Reporting
from trimtab.backends.vllm.server.metrics import Metrics
from trimtab.backends.vllm.server.middleware import SteeringMiddleware
from trimtab.backends.vllm.server.refusal import Refusal
from trimtab.backends.vllm.server.store import Store
from trimtab.errors import BackendError, InputError, SteeringError
from trimtab.sites import Site
from trimtab.steering import Add, Steering

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="prometheus_client comes with vLLM"
)
SITE = "layers.1.resid_post"
ONE = Steering({SITE: [Add([1.0, 2.0])]})


class Workers:
    """Workers that remember what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.refuse: Exception | None = None
        self.held = 0
        """Bytes that a steering takes in a worker."""

    async def ask(self, verb: str, payload: bytes = b"") -> list[dict[str, Any]]:
        await asyncio.sleep(0)
        if self.refuse is not None:
            raise self.refuse
        named = wire.from_bytes(payload)["digests"] if verb == "forget" else [Steering.loads(payload).digest]
        self.asked += [(verb, digest) for digest in named]
        return [{"bytes": 0}, {"bytes": self.held}]


class Client:
    """A client whose reports are given."""

    def __init__(self) -> None:
        sites = {Site.parse(f"layers.{layer}.resid_post"): 2 for layer in range(4)}
        self.info = SimpleNamespace(num_layers=4, hidden_size=2, widths=sites, max_payload_bytes=1 << 20)
        self.calls: list[list[str]] = []
        self.lost: set[str] = set()

    def collect(self, made: list[dict[str, Any]]) -> list[list[Report]]:
        labels = [one["trimtab"]["id"] for one in made]
        self.calls.append(labels)
        if self.lost & set(labels):
            raise BackendError("nothing is kept")
        return [[Report(label, "r", None, 3, 5, 0, ops=(OpReport(SITE, "0:Add", 5, None, 0, 5),))] for label in labels]


def at_desk(tmp_path: Path, work: Callable[[Desk, Workers, Client], Awaitable[None]]) -> None:
    from prometheus_client import CollectorRegistry

    async def run() -> None:
        store, workers, client = Store(tmp_path), Workers(), Client()
        store.put("one", ONE)
        metrics = Metrics(CollectorRegistry())
        await work(Desk(workers, client, store, metrics, max_strength=10.0), workers, client)  # type: ignore[arg-type]

    asyncio.run(run())


async def ask(
    layer: Any, method: str, path: str, body: bytes | list[bytes] = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], int]:
    """Return the status, the document and how many pieces of the body were read."""
    pieces = body if isinstance(body, list) else [body]
    given = [(key.lower().encode(), value.encode()) for key, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": given, "root_path": ""}
    read, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": pieces[read - 1], "more_body": read < len(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    await layer(scope, receive, send)
    assert sent[0]["type"] == "http.response.start"
    text = b"".join(one.get("body", b"") for one in sent[1:])
    lengths = [value for key, value in sent[0]["headers"] if key == b"content-length"]
    assert lengths == [str(len(text)).encode()]
    return sent[0]["status"], json.loads(text), read


def layer(desk: Desk, app: Any = None, key: str | None = "secret", max_bytes: int = 4096) -> SteeringMiddleware:
    return SteeringMiddleware(app, desk, Admin(desk, key=key, max_bytes=max_bytes), lambda: ["base", "a+b"])


JSON = {"Content-Type": "application/json"}
ADMIN = {"X-Trimtab-Admin-Key": "secret"}


def echo(seen: list[Any]) -> Any:
    """Return an application that remembers what it got, and what was current."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        turn = engines.CURRENT.get()
        seen.append((json.loads(body), None if turn is None else turn.text))
        assert dict(scope["headers"]).get(b"content-length", str(len(body)).encode()) == str(len(body)).encode()
        out = b'{"ok":1}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(out)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": out})

    return app


def test_steering_is_read_from_alias_and_xargs_and_current_while_the_request_runs(tmp_path: Path) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        seen: list[Any] = []
        app = layer(desk, echo(seen))
        for body in (
            {"model": "base"},
            {"model": "base+one:2"},
            {"model": "a+b"},
            {"model": "a+b+one"},
            {"model": "base", "vllm_xargs": {"trimtab": "one:-1", "other": 3}},
            {"model": "base", "vllm_xargs": {"trimtab": ["one"]}},
        ):
            status, document, _ = await ask(app, "POST", "/v1/completions", json.dumps(body).encode(), JSON)
            assert (status, document) == (200, {"ok": 1})
        assert [text for _, text in seen] == [None, "one:2", None, "one", "one:-1", "one"]
        assert [body["model"] for body, _ in seen] == ["base", "base", "a+b", "a+b", "base", "base"]
        assert engines.CURRENT.get() is None
        assert desk.metrics.active._value.get() == 0 or not desk._in_flight
        digests = [
            strengthened.digest for strengthened in (Steering({SITE: [Add([1.0, 2.0], scale=s)]}) for s in (2, 1, -1))
        ]
        assert workers.asked == [("register", digest) for digest in digests]

    at_desk(tmp_path, work)


def test_what_is_refused_never_reaches_the_application(tmp_path: Path) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        app = layer(desk, None)
        for asked in ("nobody", "one:nan", 5, None, "", [], {"v": 2, "id": "x"}):
            body = json.dumps({"model": "base", "vllm_xargs": {"trimtab": asked}}).encode()
            status, document, _ = await ask(app, "POST", "/v1/completions", body, JSON)
            assert (status, document["error"]["code"]) == (400, 400)
        beam = json.dumps({"model": "base+one", "use_beam_search": True}).encode()
        assert (await ask(app, "POST", "/v1/completions", beam, JSON))[0] == 400
        workers.refuse = SteeringError("too wide")
        body = json.dumps({"model": "base+one"}).encode()
        assert (await ask(app, "POST", "/v1/completions", body, JSON))[0] == 400
        workers.refuse = BackendError("the engine died")
        assert (await ask(app, "POST", "/v1/completions", body, JSON))[0] == 503
        assert not desk._in_flight

    at_desk(tmp_path, work)


def test_mutation_needs_the_key_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    stock = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or stock(a, b))

    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        for method in ("PUT", "DELETE"):
            status, document, read = await ask(layer(desk, key=None), method, "/v1/steerings/one", ONE.dumps(), ADMIN)
            assert (status, read) == (403, 0)
            assert "--admin-key" in document["error"]["message"]
            for key in (
                {},
                {"X-Trimtab-Admin-Key": "secreT"},
                {"X-Trimtab-Admin-Key": ""},
                {"Authorization": "secret"},
            ):
                status, _, read = await ask(layer(desk), method, "/v1/steerings/one", ONE.dumps(), key)
                assert (status, read) == (401, 0)
        assert len(compared) == 8
        assert [one.name for one in desk.store.listed()] == ["one"]
        assert (await ask(layer(desk), "PUT", "/v1/steerings/two", ONE.dumps(), ADMIN))[0] == 201
        assert (await ask(layer(desk), "PUT", "/v1/steerings/two", ONE.dumps(), ADMIN))[0] == 200
        assert (await ask(layer(desk), "DELETE", "/v1/steerings/two", b"", ADMIN))[0] == 200

    at_desk(tmp_path, work)


def test_an_upload_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        pieces = [b"x" * 65536] * 1000
        status, _, read = await ask(layer(desk), "PUT", "/v1/steerings/big", pieces, ADMIN)
        assert status == 413
        assert read * 65536 <= 4096 + SLACK + 65536
        announced = ADMIN | {"Content-Length": str(1 << 40)}
        assert (await ask(layer(desk), "PUT", "/v1/steerings/big", pieces, announced))[::2] == (413, 0)
        assert (await ask(layer(desk), "PUT", "/v1/steerings/big", b"x" * 4097, ADMIN))[0] == 413
        assert (await ask(layer(desk), "PUT", "/v1/steerings/big", b"x" * 4096, ADMIN))[0] == 400
        assert [one.name for one in desk.store.listed()] == ["one"]

    at_desk(tmp_path, work)


def test_an_upload_that_the_engine_does_not_take_is_not_stored(tmp_path: Path) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        workers.refuse = SteeringError("too many ops")
        assert (await ask(layer(desk), "PUT", "/v1/steerings/two", ONE.dumps(), ADMIN))[0] == 400
        assert not (tmp_path / "two.safetensors").exists()

    at_desk(tmp_path, work)


def test_idle_steerings_are_forgotten_and_those_in_flight_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "MAX_REGISTERED", 3)

    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        held = await desk.prepare("one:2")
        for strength in range(3, 9):
            desk.release(await desk.prepare(f"one:{strength}"))
        forgotten = [digest for verb, digest in workers.asked if verb == "forget"]
        assert len(forgotten) == 4
        assert held.plan.digest not in forgotten
        desk.release(held)
        desk.release(await desk.prepare("one:9"))
        assert ("forget", held.plan.digest) in workers.asked
        desk.release(await desk.prepare("one:2"))
        assert workers.asked.count(("register", held.plan.digest)) == 2

    at_desk(tmp_path, work)


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_idle_steerings_are_bounded_by_bytes_too(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(len(ONE.dumps()), held)
    monkeypatch.setattr(desks, "MAX_IDLE_BYTES", 3 * size + size // 2)

    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        workers.held = held
        first = await desk.prepare("one:2")
        digests = []
        for strength in range(3, 9):
            turn = await desk.prepare(f"one:{strength}")
            digests.append(turn.plan.digest)
            desk.release(turn)
        forgotten = [digest for verb, digest in workers.asked if verb == "forget"]
        assert forgotten == digests[:2]  # the newest of six was in flight when the bound was looked at
        assert first.plan.digest not in forgotten
        assert {plan.digest for plan in desk._plans.values()} == {first.plan.digest, *digests[2:]}
        desk.release(first)

    at_desk(tmp_path, work)


def test_what_the_engine_did_not_take_is_not_kept(tmp_path: Path) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        workers.refuse = SteeringError("too many ops")
        for strength in range(5):
            with pytest.raises(Refusal):
                await desk.prepare(f"one:{strength}")
        assert not desk._plans

    at_desk(tmp_path, work)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("the engine holds 2 per site; start it with ops_per_site=3", "start it with --ops-per-site 3"),
        ("start it with directions_per_op=2 (at most 64)", "start it with --directions-per-op 2 (at most 64)"),
        ("raise keys_per_steering where the engine is started", "raise --keys-per-steering where"),
        ("it was started with sites embed; add it there", "it was started with --sites embed; add it there"),
    ],
)
def test_a_steering_that_does_not_fit_is_refused_with_the_option_to_raise(tmp_path: Path, said: str, told: str) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        workers.refuse = SteeringError(said)
        with pytest.raises(Refusal) as refused:
            await desk.prepare("one:2")
        with pytest.raises(InputError) as stopped:
            await desk.check_stored()
        for text in (str(refused.value), str(stopped.value)):
            assert told in text
            assert "_per_" not in text
        workers.refuse = None
        client.info.max_payload_bytes = 9
        with pytest.raises(Refusal, match=rf"takes 9; start it with --max-payload-bytes {len(ONE.dumps())}"):
            await desk.prepare("one")

    at_desk(tmp_path, work)


class Invalid(Exception):
    """Stands for the exceptions that vLLM's routes answer."""

    def __init__(self, message: str, **_: Any) -> None:
        super().__init__(message)


class Busy(Invalid):
    """Stands for the one that they answer with 503."""


class Engine:
    """An engine whose answer is given."""

    def __init__(self, *finish: str | None, tokens: int = 3) -> None:
        outputs = [SimpleNamespace(finish_reason=one, token_ids=[1] * tokens) for one in finish]
        self.out = SimpleNamespace(finished=True, prompt_token_ids=[1, 2, 3], outputs=outputs)
        self.ran = 0

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> Any:
        self.ran += 1
        yield self.out


def refusals(desk: Desk) -> dict[str, float]:
    counted = desk.metrics.refusals.collect()[0].samples
    return {one.labels["reason"]: one.value for one in counted if one.name.endswith("_total")}


@pytest.fixture
def exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(VLLMValidationError=Invalid, RetryableRequestError=Busy)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(exceptions=stand_in))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", stand_in)


def sampling(asked: Any = None) -> Any:
    extra = {} if asked is None else {"trimtab": asked}

    def clone() -> Any:
        return SimpleNamespace(extra_args=extra)

    return SimpleNamespace(extra_args=extra, clone=clone)


@pytest.mark.usefixtures("exceptions")
def test_rows_outside_the_prompt_are_refused_before_a_stream_is_made(tmp_path: Path) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        desk.store.put("early", Steering({SITE: [Add([1.0, 2.0])]}, positions="-5:P"))
        desk.store.put("far", Steering({SITE: [Add([1.0, 2.0])]}, positions="90:95"))
        engine = Engine("stop")
        engines.install(engine, desk)
        turn = await desk.prepare("one,early:2")
        token = engines.CURRENT.set(turn)
        with pytest.raises(Invalid, match="early: positions '-5:P' begin 2 before the prompt, which has 3 tokens"):
            engine.generate({"prompt_token_ids": [1, 2, 3]}, sampling(), "r")
        assert refusals(desk) == {"outside_prompt": 1}
        for prompt in ({"prompt_token_ids": [1] * 5}, {"prompt": "text"}, "text"):  # fits, or is not known
            assert [one async for one in engine.generate(prompt, sampling(), "r")] == [engine.out]
        engines.CURRENT.set(await desk.prepare("far"))  # no such row: reported, and never an error
        assert [one async for one in engine.generate({"prompt_token_ids": [1]}, sampling(), "r")] == [engine.out]
        assert engine.ran == 4
        engines.CURRENT.reset(token)

    at_desk(tmp_path, work)


@pytest.mark.usefixtures("exceptions")
def test_refusals_of_routes_whose_bodies_are_not_read_are_counted(tmp_path: Path) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        desk.store.put("early", Steering({SITE: [Add([1.0, 2.0])]}, positions="-5:P"))
        engine = Engine("stop")
        engines.install(engine, desk)
        for asked in ("nobody", "one:99", 5, "early"):
            with pytest.raises(Invalid):
                [one async for one in engine.generate({"prompt_token_ids": [1, 2, 3]}, sampling(asked), "r")]
        assert refusals(desk) == {"unknown_name": 1, "bad_strength": 1, "bad_request": 1, "outside_prompt": 1}
        assert not engine.ran
        assert not desk._in_flight

    at_desk(tmp_path, work)


@pytest.mark.usefixtures("exceptions")
def test_what_may_pass_is_answered_so_where_bodies_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.backends.vllm.server.desk.MAX_IN_FLIGHT", 0)

    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        engine = Engine("stop")
        engines.install(engine, desk)
        with pytest.raises(Busy, match="try again later"):
            [one async for one in engine.generate("text", sampling("one"), "r")]
        with pytest.raises(Invalid) as refused:
            [one async for one in engine.generate("text", sampling("nobody"), "r")]
        assert not isinstance(refused.value, Busy)
        assert refusals(desk) == {"bad_request": 1, "unknown_name": 1}

    at_desk(tmp_path, work)


@pytest.mark.usefixtures("exceptions")
@pytest.mark.parametrize(
    ("when_full", "finish", "tokens", "full"),
    [("refuse", "error", 0, 1), ("refuse", "error", 2, 0), ("refuse", "abort", 0, 0), ("wait", "error", 0, 0)],
)
def test_a_request_that_found_no_slot_is_told_so(
    tmp_path: Path, when_full: Any, finish: str, tokens: int, full: int
) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        desk.when_full, client.info.max_steering = when_full, 7
        engine = Engine(finish, tokens=tokens)
        engines.install(engine, desk)
        said = ""
        try:
            [one async for one in engine.generate("text", sampling("one"), "r")]
        except Invalid as error:
            said = str(error)
        assert ("all 7 places of this server (--max-steering)" in said) == bool(full)
        assert refusals(desk) == ({"full": 1} if full else {})
        assert not desk._in_flight

    at_desk(tmp_path, work)


def test_equal_requests_at_once_register_once(tmp_path: Path) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        turns = await asyncio.gather(*(desk.prepare("one:2") for _ in range(20)))
        assert len([1 for verb, _ in workers.asked if verb == "register"]) == 1
        for turn in turns:
            desk.release(turn)
        assert not desk._in_flight

    at_desk(tmp_path, work)


def test_reports_are_collected_together_and_a_lost_one_costs_no_other(tmp_path: Path) -> None:
    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        client.lost = {"r3"}
        turns = [await desk.prepare("one") for _ in range(6)]
        await asyncio.gather(*(desk.collect(turn, f"r{i}", [1, 2, 3]) for i, turn in enumerate(turns)))
        assert [turn.ledger.lost for turn in turns] == [0, 0, 0, 1, 0, 0]
        assert [len(turn.ledger.rows) for turn in turns] == [1, 1, 1, 0, 1, 1]
        assert len(client.calls) < 12

    at_desk(tmp_path, work)


def _turn() -> Any:
    ledger = SimpleNamespace(sequences=1, lost=0, document=lambda text, digest: {"steering": text})
    return SimpleNamespace(text="one", plan=SimpleNamespace(digest="d"), ledger=ledger)


@given(st.lists(st.integers(1, 40), max_size=30), st.booleans(), st.text(max_size=20))
def test_a_stream_cut_anywhere_carries_the_report_in_its_last_chunk(cuts: list[int], usage: bool, text: str) -> None:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"text": t, "finish_reason": None}]} for t in ("a", text, '"choices":[]')
    ]
    chunks.append({"choices": [{"text": "", "finish_reason": "stop"}]})
    chunks += [{"choices": [], "usage": {}}] if usage else []
    lines = [b"data: " + json.dumps(one, separators=(",", ":")).encode() for one in chunks]
    whole = b"\n\n".join([b": keep-alive", *lines, b"data: [DONE]", b""])
    pieces, start = [], 0
    for cut in cuts:
        pieces.append(whole[start : start + cut])
        start += cut
    pieces.append(whole[start:])

    async def run() -> bytes:
        out: list[bytes] = []

        async def send(message: Any) -> None:
            out.append(message.get("body", b""))

        reporting = Reporting(send, _turn())
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await reporting({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            await reporting({"type": "http.response.body", "body": piece, "more_body": True})
        await reporting({"type": "http.response.body", "body": b"", "more_body": False})
        return b"".join(out)

    got = asyncio.run(run()).split(b"\n\n")
    assert got[0] == b": keep-alive"
    assert got[1 : len(lines)] == lines[:-1]
    assert json.loads(got[len(lines)].removeprefix(b"data: ")) == chunks[-1] | {"trimtab": {"steering": "one"}}
    assert got[len(lines) + 1 :] == [b"data: [DONE]", b""]


def test_chunks_are_passed_on_as_they_come(tmp_path: Path) -> None:
    async def run() -> None:
        out: list[bytes] = []

        async def send(message: Any) -> None:
            out.append(message.get("body", b""))

        reporting = Reporting(send, _turn())
        headers = [(b"content-type", b"text/event-stream")]
        await reporting({"type": "http.response.start", "status": 200, "headers": headers})
        first = b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
        await reporting({"type": "http.response.body", "body": first, "more_body": True})
        assert out[-1] == first

    asyncio.run(run())


def test_a_raw_entry_of_the_wire_form_is_never_believed(tmp_path: Path) -> None:
    """A route that takes sampling parameters whole could carry a digest of the sender's choice."""

    async def work(desk: Desk, workers: Workers, client: Client) -> None:
        for given_entry in ({"v": 2, "id": "x", "steering": {"digest": "00", "ops": "[]"}}, 5, ["one"], None):
            with pytest.raises(Refusal):
                await desk.prepare(given_entry)

    at_desk(tmp_path, work)
