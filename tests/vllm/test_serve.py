"""`trimtab serve` as its users meet it: a real server, a real `openai` client, one engine for all tests."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

import trimtab as tt
from trimtab.backends import Message, Request, open_backend
from trimtab.steering import AblateSubspace, Add, Cap, Steering

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
    pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed: make test does it"),
]
KEY, ADMIN, LIMIT = "for-clients", "for-the-operator", 65536
PROMPT, TOKENS = "The cat", 24
START_SECONDS = 300
DEATH_SECONDS = 90


def vector(seed: int) -> torch.Tensor:
    return torch.randn(128, generator=torch.Generator().manual_seed(seed))


def add(seed: int, scale: float, positions: str = "all") -> Steering:
    return Steering({f"layers.{seed}.resid_post": [Add(vector(seed), scale=scale)]}, positions=positions)


def plain(text: str) -> str:
    """Return generated text without the space before its first word, which our own decoding leaves out."""
    return text.removeprefix(" ")


STORED = {
    "calm": add(2, 4.0),
    "formal": add(3, -4.0, positions="generated"),
    "capped": Steering({"layers.3.resid_post": [Cap(vector(3), max=-8.0)]}),
    "far": add(4, 1.0, positions="200:210"),
    "early": add(4, 3.0, positions="-50:P"),
}


@dataclass
class Server:
    port: int
    directory: Path
    process: subprocess.Popen[bytes]
    log: Path
    killed: bool = False
    """Whether a test has ended it."""

    @cached_property
    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0)

    def text(self, steering: str | None = None, model: str = "testbed", **more: Any) -> str:
        return plain(self.complete(steering, model, **more).choices[0].text)

    def complete(self, steering: str | None = None, model: str = "testbed", **more: Any) -> Any:
        body = {"ignore_eos": True} | ({} if steering is None else {"vllm_xargs": {"trimtab": steering}})
        settings = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0} | more
        return self.client.completions.create(model=model, extra_body=body, **settings)

    def http(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"Authorization": f"Bearer {KEY}"} | (headers or {})
        try:
            connection.request(method, path, body=body, headers=given)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def admin(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        return self.http(method, path, body, {"X-Trimtab-Admin-Key": ADMIN})

    def metric(self, line: str) -> float:
        status, text = self.http("GET", "/metrics")
        assert status == 200
        found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("steerings")
    with serving(STORED, directory, "--max-upload-bytes", str(LIMIT), "--ops-per-site", "3") as made:
        yield made


@contextmanager
def serving(steerings: dict[str, Steering], directory: Path, *options: str) -> Iterator[Server]:
    for name, steering in steerings.items():
        steering.save(directory / f"{name}.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "trimtab", "serve", "testbed", "--steering", str(directory), "--port", str(port)]
    argv += ["--dtype", "float32", "--max-model-len", "256", *options]
    argv += ["--engine", "enforce_eager=true", "--engine", f"api_key={KEY}"]
    env = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    log = directory.parent / f"{directory.name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            argv,
            env=os.environ | env | {"TRIMTAB_ADMIN_KEY": ADMIN},
            cwd=directory.parent,
            stdout=stream,
            stderr=stream,
        )
        try:
            made = Server(port, directory, process, log)
            _wait(made)
            yield made
            made.client.close()
            if not made.killed:
                process.terminate()
                assert process.wait(timeout=120) == 0, log.read_text()[-3000:]
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if server.http("GET", "/health")[0] == 200:
                return
        except OSError:
            pass  # it does not listen yet
        try:
            server.process.wait(timeout=0.25)
        except subprocess.TimeoutExpired:
            continue
        break
    pytest.fail(f"the server did not come up:\n{server.log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    """Return what our Hugging Face backend generates under a steering, each request alone."""
    backend = open_backend("hf", "testbed", dtype="float32", batch_size=1)

    def text(steering: Steering | None, prompt: Any = PROMPT, tokens: int = TOKENS) -> str:
        request = Request(prompt=prompt, id="r", steering=steering, max_new_tokens=tokens, ignore_eos=True)
        return backend.generate([request], allow_unfired=True)[0].text

    yield text
    backend.close()


# what is generated


@pytest.mark.parametrize(
    ("asked", "steering"),
    [
        (None, None),
        ("calm", STORED["calm"]),
        ("calm:1.5", add(2, 6.0)),
        ("calm:-1e0", add(2, -4.0)),
        ("formal:2.5", add(3, -10.0, positions="generated")),
        ("capped", STORED["capped"]),
        ("calm:0.5,formal:2", add(2, 2.0) + add(3, -8.0, positions="generated")),
        (f"sha:{STORED['calm'].digest}:2", add(2, 8.0)),
        (f"sha:{STORED['calm'].digest[:16]},capped:1", STORED["calm"] + STORED["capped"]),
    ],
)
def test_an_answer_is_what_the_offline_reference_generates(
    server: Server, reference: Any, asked: str | None, steering: Steering | None
) -> None:
    assert server.text(asked) == reference(steering)


def test_steerings_change_the_answer_and_each_in_its_own_way(server: Server) -> None:
    asked = [None, "calm", "calm:1.5", "calm:-1", "formal:2.5", "capped"]
    assert len({server.text(one) for one in asked}) == len(asked)
    assert server.text("calm:0") == server.text()


def test_an_alias_names_the_steering_and_is_listed(server: Server, reference: Any) -> None:
    assert server.text(model="testbed+calm") == reference(STORED["calm"])
    assert server.text(model="testbed+calm:1.5") == reference(add(2, 6.0))
    both = STORED["calm"] + add(3, -8.0, positions="generated")
    assert server.text("formal:2", model="testbed+calm") == reference(both)
    listed = {card.id: card.model_extra["parent"] for card in server.client.models.list()}
    assert listed["testbed"] is None
    assert listed["testbed+calm"] == listed["testbed+capped"] == "testbed"


def test_chat_streams_what_it_returns_whole_and_reports_in_the_last_chunk(server: Server, reference: Any) -> None:
    messages = [{"role": "user", "content": "Tell me about the cat"}]
    settings: dict[str, Any] = {"model": "testbed", "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    settings["extra_body"] = {"ignore_eos": True, "vllm_xargs": {"trimtab": "calm:1.5,far"}}
    whole = server.client.chat.completions.create(**settings)
    expected = reference(add(2, 6.0), (Message(role="user", content="Tell me about the cat"),))
    assert plain(whole.choices[0].message.content) == expected
    for more in ({}, {"stream_options": {"include_usage": True}}):
        chunks = list(server.client.chat.completions.create(stream=True, **settings, **more))
        assert plain("".join(one.choices[0].delta.content or "" for one in chunks if one.choices)) == expected
        assert [("trimtab" in (one.model_extra or {})) for one in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].model_extra["trimtab"] | {"sequences": 1} == whole.model_extra["trimtab"]
        assert (chunks[-1].usage is not None) == bool(more)


def test_concurrent_clients_get_what_each_gets_alone(server: Server, reference: Any) -> None:
    from openai import AsyncOpenAI

    asked = {None: None, "calm:1.5": add(2, 6.0), "formal:2.5": add(3, -10.0, "generated"), "capped": STORED["capped"]}
    prompts = [PROMPT, "In the garden the dog"]
    expected = {(name, prompt): reference(one, prompt) for name, one in asked.items() for prompt in prompts}

    async def one(client: AsyncOpenAI, name: str | None, prompt: str) -> tuple[tuple[str | None, str], str]:
        body = {"ignore_eos": True} | ({"vllm_xargs": {"trimtab": name}} if name else {})
        stream = await client.completions.create(
            model="testbed", prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body=body, stream=True
        )
        return (name, prompt), plain("".join([chunk.choices[0].text async for chunk in stream]))

    async def both() -> list[tuple[tuple[str | None, str], str]]:
        where = f"http://127.0.0.1:{server.port}/v1"
        async with (
            AsyncOpenAI(base_url=where, api_key=KEY) as first,
            AsyncOpenAI(base_url=where, api_key=KEY) as second,
        ):
            pairs = [(client, *key) for _ in range(2) for key in expected for client in (first, second)]
            return await asyncio.gather(*(one(*pair) for pair in pairs))

    answers = asyncio.run(both())
    assert len(answers) == 32
    assert all(text == expected[key] for key, text in answers)


def test_several_prompts_and_choices_are_one_report(server: Server) -> None:
    made = server.complete("calm", prompt=[PROMPT, "In the garden the dog"], n=2, temperature=1.0, max_tokens=5)
    report = made.model_extra["trimtab"]
    assert len(made.choices) == 4
    assert report["sequences"] == 4
    assert report["digest"] == STORED["calm"].digest


# what is refused


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("nobody", "there is no steering 'nobody'; this server has calm, capped"),
        ("calm:nan", "not a finite decimal number"),
        ("calm:inf", "not a finite decimal number"),
        ("calm:1e999", "beyond the limit of 100"),
        ("calm:101", "beyond the limit of 100"),
        ("calm:", "not a finite decimal number"),
        ("calm:1:2", "too many colons"),
        ("calm,calm:2", "named twice"),
        ("../calm", "cannot be used"),
        (f"sha:{'0' * 64}", "no steering has a digest"),
        ("capped:2", "says where a projection ends up and not how far it is moved"),
        ("", "text such as 'name:1.5'"),
        (7, "text such as 'name:1.5'"),
        ([1.5, 2], "text such as 'name:1.5'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_steered_is_a_400_before_anything_is_sent(
    server: Server, asked: Any, says: str, stream: bool
) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        server.complete(asked, stream=stream)
    assert says in caught.value.message
    assert caught.value.param == "vllm_xargs.trimtab"


def test_an_unknown_alias_is_a_400_and_an_unknown_model_stays_a_404(server: Server) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="there is no steering 'nobody'"):
        server.text(model="testbed+nobody")
    for model in ("other", "other+calm"):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            server.text(model=model)


@pytest.mark.parametrize("stream", [False, True])
def test_rows_outside_the_prompt_are_a_400_before_anything_is_sent(
    server: Server, reference: Any, stream: bool
) -> None:
    import openai

    before = server.metric('trimtab_refusals_total{reason="outside_prompt"}')
    long = " ".join(["The cat rested near the market ."] * 12)
    for prompt in (PROMPT, [long, PROMPT]):
        with pytest.raises(openai.BadRequestError) as caught:
            server.complete("calm,early", prompt=prompt, stream=stream)
        assert "early: positions '-50:P' begin 47 before the prompt, which has 3 tokens" in caught.value.message
        assert caught.value.param == "vllm_xargs.trimtab"
    body = {"vllm_xargs": {"trimtab": "early"}}
    with pytest.raises(openai.BadRequestError, match=r"begin \d+ before the prompt"):
        server.client.chat.completions.create(
            model="testbed", messages=[{"role": "user", "content": "Hi"}], extra_body=body, stream=stream
        )
    assert server.metric('trimtab_refusals_total{reason="outside_prompt"}') == before + 3
    assert server.metric("trimtab_steerings_active") == 0
    assert server.text("early", prompt=long, max_tokens=8) == reference(STORED["early"], long, 8)


def test_rows_outside_the_prompt_of_a_response(server: Server) -> None:
    body = {"model": "testbed", "input": "Hi", "vllm_xargs": {"trimtab": "early"}, "max_output_tokens": 4}
    json_type = {"Content-Type": "application/json"}
    status, text = server.http("POST", "/v1/responses", json.dumps(body), json_type)
    assert status == 400
    assert "before the prompt" in json.loads(text)["error"]["message"]
    with pytest.raises(http.client.IncompleteRead) as caught:  # vLLM had begun it before it made the prompt
        server.http("POST", "/v1/responses", json.dumps(body | {"stream": True}), json_type)
    assert b"response.completed" not in caught.value.partial
    assert server.metric("trimtab_steerings_active") == 0


def test_beam_search_is_refused_with_a_steering_and_runs_without(server: Server) -> None:
    body = {"model": "testbed", "prompt": PROMPT, "max_tokens": 3, "use_beam_search": True, "n": 2, "temperature": 0}
    json_type = {"Content-Type": "application/json"}
    assert server.http("POST", "/v1/completions", json.dumps(body), json_type)[0] == 200
    status, text = server.http("POST", "/v1/completions", json.dumps(body | {"model": "testbed+calm"}), json_type)
    assert status == 400
    assert "use_beam_search cannot be steered" in text


def test_vllm_authenticates_before_our_layer_looks(server: Server) -> None:
    json_type = {"Content-Type": "application/json", "Authorization": "Bearer wrong", "X-Trimtab-Admin-Key": ADMIN}
    body = json.dumps({"model": "testbed+nobody", "prompt": "a"})
    assert server.http("POST", "/v1/completions", body, json_type)[0] == 401
    assert server.http("GET", "/v1/steerings", None, json_type)[0] == 401
    assert server.http("DELETE", "/v1/steerings/calm", None, json_type)[0] == 401


# doses


def test_an_op_that_found_no_row_is_reported_and_is_no_error(server: Server) -> None:
    before = server.metric('trimtab_unfired_ops_total{steering="far"}')
    report = server.complete("calm,far", max_tokens=5).model_extra["trimtab"]
    assert [(one["steering"], one["rows"]) for one in report["ops"]] == [("calm", 7), ("far", 0)]
    (unfired,) = report["unfired"]
    assert unfired == {
        "site": "layers.4.resid_post", "op": "0:Add", "steering": "far", "reason": "no such row", "sequences": 1,
    }  # fmt: skip
    assert server.metric('trimtab_unfired_ops_total{steering="far"}') == before + 1


def test_rows_that_the_prefix_cache_held_are_not_unfired(server: Server) -> None:
    steering = add(2, 2.0, positions="0:16")
    assert server.admin("PUT", "/v1/steerings/head", steering.dumps())[0] in (200, 201)
    prompt = " ".join(["The cat rested near the market ."] * 24)  # longer than a block of the cache
    reports = [server.complete("head", prompt=prompt, max_tokens=3).model_extra["trimtab"] for _ in range(2)]
    assert [one["ops"][0]["rows"] for one in reports] == [16, 0]
    assert [one["unfired"] for one in reports] == [[], []]


def test_metrics_show_requests_rows_refusals_and_what_is_held(server: Server) -> None:
    names = (
        'requests_total{steering="calm"}',
        'dose_rows_total{steering="calm"}',
        'refusals_total{reason="bad_strength"}',
    )
    before = [server.metric(f"trimtab_{name}") for name in names]
    server.text("calm", max_tokens=5)
    with pytest.raises(Exception, match="not a finite"):
        server.text("calm:x")
    after = [server.metric(f"trimtab_{name}") for name in names]
    prompt_rows = 3
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, prompt_rows + 5 - 1, 1]
    assert server.metric("trimtab_steerings_stored") == len(json.loads(server.http("GET", "/v1/steerings")[1])["data"])
    assert server.metric("trimtab_steerings_registered") >= len(STORED)
    assert server.metric("trimtab_steerings_active") == 0
    assert server.metric("trimtab_reports_lost_total") == 0


def test_active_steerings_are_those_of_requests_in_flight(server: Server) -> None:
    with server.complete("calm:3", stream=True, max_tokens=240) as stream:
        next(iter(stream))
        assert server.metric("trimtab_steerings_active") == 1
        for _ in stream:
            pass
    assert server.metric("trimtab_steerings_active") == 0


def test_a_client_that_leaves_frees_its_steering(server: Server) -> None:
    for _ in range(3):
        with server.complete("calm:4", stream=True, max_tokens=240) as stream:
            next(iter(stream))
    deadline = time.monotonic() + 30
    while server.metric("trimtab_steerings_active") and time.monotonic() < deadline:
        server.text(max_tokens=1)
    assert server.metric("trimtab_steerings_active") == 0
    assert server.metric("trimtab_reports_lost_total") == 0


# the directory


def test_the_list_says_what_each_steering_is(server: Server) -> None:
    status, text = server.http("GET", "/v1/steerings")
    listed = {one["id"]: one for one in json.loads(text)["data"]}
    assert status == 200
    assert set(STORED) <= set(listed)
    assert listed["calm"]["digest"] == STORED["calm"].digest
    assert listed["calm"]["takes_strength"] is True
    assert listed["capped"]["takes_strength"] is False
    status, text = server.http("GET", "/v1/steerings/capped")
    assert (status, json.loads(text)) == (200, listed["capped"])
    assert server.http("GET", "/v1/steerings/nobody")[0] == 404


def test_an_upload_can_be_used_replaced_and_removed(server: Server, reference: Any) -> None:
    one, two = add(1, 3.0), add(1, -3.0)
    path = server.directory / "mine.safetensors"
    status, text = server.admin("PUT", "/v1/steerings/mine", one.dumps())
    assert (status, json.loads(text)["digest"]) == (201, one.digest)
    assert tt.Steering.load(path) == one
    assert server.text("mine") == reference(one)
    assert server.admin("PUT", "/v1/steerings/mine", two.dumps())[0] == 200
    assert server.text("mine") == reference(two)
    status, text = server.admin("DELETE", "/v1/steerings/mine")
    assert (status, json.loads(text)["deleted"]) == (200, True)
    assert not path.exists()
    assert server.admin("DELETE", "/v1/steerings/mine")[0] == 404
    with pytest.raises(Exception, match="there is no steering 'mine'"):
        server.text("mine")


def test_removal_lets_a_request_in_flight_finish_steered(server: Server, reference: Any) -> None:
    steering = add(1, 3.0)
    assert server.admin("PUT", "/v1/steerings/passing", steering.dumps())[0] == 201
    with server.complete("passing", stream=True, max_tokens=120) as stream:
        pieces = [next(iter(stream)).choices[0].text]
        assert server.admin("DELETE", "/v1/steerings/passing")[0] == 200
        pieces += [chunk.choices[0].text for chunk in stream]
    assert plain("".join(pieces)) == reference(steering, tokens=120)


@pytest.mark.parametrize("key", [None, "", "wrong", ADMIN[:-1], ADMIN + "x"])
def test_changes_need_the_admin_key(server: Server, key: str | None) -> None:
    headers = {} if key is None else {"X-Trimtab-Admin-Key": key}
    before = server.metric('trimtab_refusals_total{reason="wrong_key"}')
    assert server.http("PUT", "/v1/steerings/intruder", STORED["calm"].dumps(), headers)[0] == 401
    assert server.http("DELETE", "/v1/steerings/calm", None, headers)[0] == 401
    assert not (server.directory / "intruder.safetensors").exists()
    assert (server.directory / "calm.safetensors").exists()
    assert server.metric('trimtab_refusals_total{reason="wrong_key"}') == before + 2


class Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_uploads_that_are_no_steering_files_are_refused(server: Server, tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"
    torch.save({"direction": vector(1)}, tmp_path / "vector.pt")
    uploads = [
        b"",
        b"{}",
        pickle.dumps(Trap(marker)),
        (tmp_path / "vector.pt").read_bytes(),
        STORED["calm"].dumps()[:-4],
    ]
    for data in uploads:
        status, text = server.admin("PUT", "/v1/steerings/bad", data)
        assert status == 400, text
        assert "steering file" in json.loads(text)["error"]["message"]
    assert not marker.exists()
    assert not list(server.directory.glob("*bad*"))


def test_uploads_that_do_not_fit_the_model_are_refused(server: Server) -> None:
    wide = Steering({"layers.1.resid_post": [Add(torch.ones(64))]})
    deep = Steering({"layers.60.resid_post": [Add(torch.ones(128))]})
    elsewhere = Steering({"layers.1.mlp_out": [Add(torch.ones(128))]})
    for steering, says in ((wide, "width 64"), (deep, "layers.60"), (elsewhere, "does not steer layers.1.mlp_out")):
        status, text = server.admin("PUT", "/v1/steerings/unfit", steering.dumps())
        assert status == 400
        assert says in json.loads(text)["error"]["message"]
    assert not (server.directory / "unfit.safetensors").exists()


def test_uploads_over_the_limit_are_cut_off(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 4096

    assert server.admin("PUT", "/v1/steerings/big", b"x" * (LIMIT + 1))[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Authorization": f"Bearer {KEY}", "X-Trimtab-Admin-Key": ADMIN, "Transfer-Encoding": "chunked"}
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # a body without end meets a closed connection
        connection.request("PUT", "/v1/steerings/big", body=endless(), headers=headers, encode_chunked=True)
    connection.close()
    assert server.http("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "%2e%2e%2fx",
        "..%2f..%2fx",
        "%2e%2e",
        ".hidden",
        "a/b",
        "a%2fb",
        "a%00b",
        "a b".replace(" ", "%20"),
        "x" * 65,
        "sha",
    ],
)
def test_names_cannot_leave_the_directory(server: Server, name: str) -> None:
    def files() -> set[Path]:
        return set(server.directory.parent.rglob("*.safetensors"))

    before = files()
    for method, body in (("PUT", STORED["calm"].dumps()), ("DELETE", None), ("GET", None)):
        status, text = server.admin(method, f"/v1/steerings/{name}", body)
        assert status == 400, (method, text)
        assert "cannot be used" in text
    assert files() == before


def test_other_methods_are_refused_with_what_is_allowed(server: Server) -> None:
    assert server.admin("POST", "/v1/steerings/calm", b"")[0] == 405
    assert server.admin("DELETE", "/v1/steerings")[0] == 405


def test_the_server_listens_on_the_loopback_address_alone(server: Server) -> None:
    listening = {
        one.laddr.ip
        for one in psutil.net_connections("inet")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == server.port
    }
    assert listening == {"127.0.0.1"}


# sizes and slots


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one place, for which nothing waits."""
    options = ("--max-steering", "1", "--when-full", "refuse", "--storage", "bfloat16", "--engine", "max_num_seqs=4")
    with serving(NARROW, tmp_path_factory.mktemp("narrow"), *options) as made:
        yield made


SPOTS = [Steering({"layers.3.resid_post": [Add(vector(n), scale=0.5)]}, positions=f"{n}:{n + 1}") for n in range(5)]
NARROW = {
    "spots": Steering.of(bound for one in SPOTS for bound in one.bound),
    "wide": Steering({"layers.2.resid_post": [AblateSubspace([vector(n).tolist() for n in range(3)], keep=0.0)]}),
    "calm": STORED["calm"],
}


def test_the_engine_is_as_large_as_the_files_need_and_full_slots_are_told(narrow: Server) -> None:
    """Rows, directions, ops and keys beyond the defaults of the plugin; one place, and no waiting for it."""
    import openai

    prompt = "In the garden the dog saw the cat"
    report = narrow.complete("spots,wide", prompt=prompt, max_tokens=3).model_extra["trimtab"]
    assert [one["rows"] for one in report["ops"] if one["steering"] == "spots"] == [1] * 5
    assert [one["rows"] for one in report["ops"] if one["steering"] == "wide"] == [report_rows(narrow, prompt) + 2]
    uploaded = add(3, 1.0) + NARROW["spots"]
    status, text = narrow.admin("PUT", "/v1/steerings/six", (uploaded + add(3, 2.0)).dumps())
    assert status == 400
    assert "start it with --ops-per-site 7" in json.loads(text)["error"]["message"]
    with narrow.complete("calm:2", stream=True, max_tokens=200) as stream:
        next(iter(stream))
        with pytest.raises(openai.InternalServerError, match="other steerings hold all 1 places") as caught:
            narrow.complete("wide", max_tokens=2)
        assert caught.value.status_code == 503
        with pytest.raises(openai.APIError, match="other steerings hold all 1 places"):
            list(narrow.complete("wide", max_tokens=2, stream=True))
        assert narrow.complete("calm:2", max_tokens=2).choices[0].finish_reason == "length"
    assert narrow.metric('trimtab_refusals_total{reason="full"}') == 2
    assert narrow.metric("trimtab_reports_lost_total") == 0


def report_rows(server: Server, prompt: str) -> int:
    """Return how many tokens a prompt has."""
    return int(server.complete(prompt=prompt, max_tokens=1).usage.prompt_tokens)


def test_a_server_whose_engine_is_killed_answers_everybody_and_ends(narrow: Server) -> None:
    """The last test of its server: three requests are under way, more come, and the process says why it ends."""
    import openai

    def fresh() -> tuple[int, str]:
        """Ask for a steering that the engine does not know yet."""
        body = json.dumps({"model": "testbed+calm:3", "prompt": PROMPT, "max_tokens": 2})
        return narrow.http("POST", "/v1/completions", body, {"Content-Type": "application/json"})

    (core,) = [one for one in psutil.Process(narrow.process.pid).children() if "EngineCore" in " ".join(one.cmdline())]
    narrow.killed = True
    counted = 'trimtab_requests_total{steering="calm"}'
    before = narrow.metric(counted)
    deadline = time.monotonic() + DEATH_SECONDS
    settings = {"stream": True, "max_tokens": 240, "timeout": DEATH_SECONDS}
    with ThreadPoolExecutor(2) as pool, narrow.complete("calm", **settings) as stream:
        next(iter(stream))
        core.suspend()  # it takes what comes, and does not answer
        waiting, registering = pool.submit(narrow.complete, "calm", timeout=DEATH_SECONDS), pool.submit(fresh)
        while narrow.metric(counted) < before + 2 or narrow.metric("trimtab_steerings_active") < 2:
            assert time.monotonic() < deadline
        core.kill()
        failed = waiting.exception(DEATH_SECONDS)
        assert isinstance(failed, openai.InternalServerError)
        status, text = registering.result(DEATH_SECONDS)
        assert status == 503
        assert "the engine has died" in json.loads(text)["error"]["message"]
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
    while narrow.process.poll() is None:
        assert time.monotonic() < deadline
        with suppress(OSError, http.client.HTTPException):  # it listens no longer
            assert fresh()[0] >= 500
    assert narrow.process.returncode == 2
    said = [line for line in narrow.log.read_text().splitlines() if line.startswith("trimtab: the engine has died")]
    assert len(said) == 1
