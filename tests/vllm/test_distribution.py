"""One engine of several workers does what one worker does: tensor, pipeline and data parallel, and on Ray.

The embedded model, float32, eager. Every engine runs the same batch: requests that are steered, steered otherwise,
recorded, measured, forced along tokens, and left alone, and make 1, 2, 12 or 33 tokens; what comes home is held against
the engine of one worker.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from trimtab import testbed
from trimtab.backends.vllm import Client, wire
from trimtab.backends.vllm.admission import Admission
from trimtab.backends.vllm.answers import answer
from trimtab.backends.vllm.config import KEY, PluginConfig
from trimtab.backends.vllm.core import _watch as watch
from trimtab.backends.vllm.state import Left
from trimtab.backends.vllm.wire import RequestData
from trimtab.errors import BackendError
from trimtab.numerics.tolerances import engine_row_rel_l2
from trimtab.sites import Site
from trimtab.steering import Ablate, Add, Cap, Ramp, Steering

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
    pytest.mark.filterwarnings("ignore"),
]
WIDTH, LAYERS, TOKENS, BLOCK = 128, 6, 12, 32
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SHARDED = ("q", "k", "v", "attn_z", "mlp_act")
ENDS = ("embed", "final_norm", "logits")
EVERY = (*ENDS, *(f"layers.{layer}.{point}" for layer in range(LAYERS) for point in (*STREAM, *SHARDED)))
BEGINNING = ("embed", "layers.0.resid_pre")
"""Where neither is asked for, the stream is begun without a tap."""
STEERED = ("layers.*.resid_post", "layers.3.resid_pre", "layers.5.attn_raw", "layers.1.mlp_act", "layers.4.q", "logits")
REFUSED = {"layers.1.mlp_act": 384, "layers.4.q": 128, "layers.4.resid_mid": 128}
"""The first two under tensor parallelism only; the last one because no engine here is asked to steer it."""
SECONDS = 400


def direction(seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


BOTH_STAGES = Steering(
    {
        "layers.1.resid_post": [Add(direction(1), scale=2.0)],
        "layers.4.resid_post": [Cap(direction(2), min=-0.5, max=0.5)],
        "logits": [Add(direction(7, 188), scale=0.5)],
    }
)
"""On layers of both pipeline stages, and on the logits, which only the last one has."""
LATE = Steering(
    {"layers.3.resid_pre": [Add(direction(3), scale=3.0)]}, positions="generated", gain=Ramp(0.6)
) + Steering(
    {"layers.5.resid_post": [Ablate(direction(4), keep=0.25)], "layers.5.attn_raw": [Add(direction(5), scale=1.0)]}
)
"""On what the second stage receives, and on its last layer."""
BY_TOKEN = Steering({"layers.4.resid_post": [Add(direction(6), scale=2.0)]}, positions="tokens{11,15,20}")
DECODING = Steering(
    {f"layers.{layer}.resid_post": [Add(direction(8), scale=1.0)] for layer in (1, 4)}, positions="generated"
)
"""It leaves blocks of the prompt to everybody."""
HOSTILE = {"enable_prefix_caching": True, "block_size": BLOCK, "max_model_len": 128, "num_gpu_blocks_override": 7}
"""An engine that shares blocks, and has room for half of what it is asked for."""


@dataclass(frozen=True)
class Asked:
    length: int
    """Of its prompt; prompts of one length are equal."""
    steering: Steering | None = None
    sites: tuple[str, ...] = ()
    edit: tuple[str, ...] = ("after",)
    positions: str = "all"
    dose: str = "counts"
    forced: tuple[int, ...] | None = None
    n: int = 1
    tokens: int = TOKENS


BATCH = (
    Asked(40, tokens=33),
    Asked(40, DECODING, ("layers.*.resid_post", "final_norm"), positions="generated", tokens=33),
    Asked(5, BOTH_STAGES, EVERY),
    Asked(33, None, EVERY, tokens=33),
    Asked(20, LATE, dose="full"),
    Asked(9, tokens=1),
    Asked(12, LATE, ("layers.*.resid_post", "layers.3.resid_pre"), ("before", "after"), tokens=33),
    Asked(16, BY_TOKEN, ("layers.4.resid_post",), forced=tuple(range(10, 10 + TOKENS))),
    Asked(7, BOTH_STAGES, ("final_norm",), forced=tuple(range(40, 40 + TOKENS)), n=2),
    Asked(35, BOTH_STAGES, EVERY, tokens=1),
    Asked(14, LATE, EVERY, tokens=2),
)
SHARING, RECORDED = 1, 2
"""Finds the first block of its prompt in the cache; is recorded everywhere."""


@dataclass
class Found:
    """What an engine made."""

    document: dict[str, Any]
    rows: dict[str, Tensor]
    places: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    """Of each tensor: positions and pipeline stage."""

    def __post_init__(self) -> None:
        for one in self.document["requests"]:
            for child in one["children"]:
                for key, positions, stage in child["captured"]:
                    self.places[key] = (tuple(positions), stage)

    @property
    def tokens(self) -> list[list[list[int]]]:
        return [one["tokens"] for one in self.document["requests"]]

    @property
    def ops(self) -> list[list[Any]]:
        return [[sorted(child["ops"]) for child in one["children"]] for one in self.document["requests"]]


def start(
    folder: Path, name: str, kind: str = "llm", without: tuple[str, ...] = (), dies: bool = False, **engine: Any
) -> Found:
    """Run the batch in an engine, in a process of its own; sites of `without` are not recorded."""
    every = [site for site in EVERY if site not in without]
    requests = []
    for number, (prompt, asked) in enumerate(zip(prompts(), BATCH, strict=True)):
        file = None
        if asked.steering is not None:
            file = str(folder / f"{number}.steering")
            asked.steering.save(file)
        sites = [site for site in asked.sites if site not in without]
        requests.append({**vars(asked), "sites": sites, "steering": file, "prompt": prompt})
    refused = []
    for number, (site, width) in enumerate(
        (("layers.1.mlp_act", 384), ("layers.4.q", 128), ("layers.4.resid_mid", 128))
    ):
        refused.append(str(folder / f"refused-{number}.steering"))
        Steering({site: [Add(direction(0, width), scale=1.0)]}).save(refused[-1])
    settings = {"sites": list(STEERED), "capture_sites": every, "max_steering": 4}
    plan = {
        "name": name,
        "kind": kind,
        "dies": dies,
        "model": str(testbed.path()),
        "folder": str(folder),
        "settings": settings,
    }
    path = folder / f"plan-{name}.json"
    path.write_text(json.dumps({**plan, "engine": engine, "refused": refused, "requests": requests}))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if kind == "async" else "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_HOST_IP": "127.0.0.1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, str(Path(__file__).with_name("distribution_engine.py")), str(path)]
    with (folder / f"said-{name}.txt").open("w") as said:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=said, stderr=said, start_new_session=True
        )
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    result = folder / f"{name}.json"
    assert result.exists(), (folder / f"said-{name}.txt").read_text()[-4000:]
    return Found(json.loads(result.read_text()), safetensors.torch.load_file(folder / f"{name}.safetensors"))


def prompts() -> list[list[int]]:
    drawn = [torch.randint(3, 180, (one.length,), generator=torch.Generator().manual_seed(one.length)) for one in BATCH]
    return [one.tolist() for one in drawn]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One worker with a cache of blocks that is too small for the batch."""
    return start(tmp_path_factory.mktemp("alone"), "alone", **HOSTILE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One worker that shares no blocks: what is computed does not depend on what runs beside it."""
    return start(tmp_path_factory.mktemp("plain"), "plain")


def check(found: Found, alone: Found, without: tuple[str, ...] = ()) -> None:
    """Tokens and counts are equal, rows are within the table's bound."""
    wanted = {key: rows for key, rows in alone.rows.items() if key.split("/")[2] not in without}
    assert found.tokens == alone.tokens
    assert found.ops == alone.ops
    assert set(found.rows) == set(wanted)
    assert {key: positions for key, (positions, _) in found.places.items()} == {
        key: positions for key, (positions, _) in alone.places.items() if key in wanted
    }
    errors = {}
    for key, reference in wanted.items():
        site = Site.parse(key.split("/")[2])
        mine = found.rows[key]
        assert mine.shape == reference.shape
        if "/full" in key:
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4, equal_nan=True)
            continue
        error = ((mine - reference).double().norm(dim=1) / reference.double().norm(dim=1).clamp_min(1e-30)).max()
        bound = engine_row_rel_l2("float32", LAYERS if site.layer is None else site.layer)
        if not float(error) < bound:
            errors[key] = (float(error), bound)
    assert not errors
    assert "is not kept in any engine" in found.document["unknown"]
    for worker in found.document["stats"]:
        assert (worker["tracked"], worker["left"], worker["recorded_bytes"], worker["active"]) == (0, 0, 0, 0)


def test_one_worker_keeps_the_law_of_rows_and_counts(alone: Found) -> None:
    for number, (prompt, asked) in enumerate(zip(prompts(), BATCH, strict=True)):
        rows = len(prompt) + asked.tokens - 1
        one = alone.document["requests"][number]
        assert len(one["children"]) == asked.n
        for child in one["children"]:
            for key, positions, _ in child["captured"]:
                first = len(prompt) if asked.positions == "generated" else len(prompt) - 1 if "/logits/" in key else 0
                if "/full" not in key:
                    assert positions == list(range(first, rows))
            assert child["rows"] == rows
            assert child["cached"] == (BLOCK if number == SHARING else 0)
            counts = {(op[0], op[1]): op[2] for op in child["ops"]}
            if asked.steering is BOTH_STAGES:
                assert counts["layers.1.resid_post", "0:Add"] == rows
                assert counts["logits", "0:Add"] == asked.tokens
            if asked.steering is LATE:
                assert counts["layers.3.resid_pre", "0:Add"] == asked.tokens - 1
            if asked.steering is DECODING:
                assert set(counts.values()) == {asked.tokens - 1}
            if asked.steering is BY_TOKEN:
                chosen = [token for token in [*prompt, *(asked.forced or ())][:rows] if token in (11, 15, 20)]
                assert counts["layers.4.resid_post", "0:Add"] == len(chosen) > 0
    assert alone.document["said"][:2] == ["", ""]
    assert "does not steer layers.4.resid_mid" in alone.document["said"][2]
    assert {key.split("/")[2] for key in alone.rows if key.startswith(f"{RECORDED}/")} == set(EVERY)
    assert alone.document["preempted"] > 0


@pytest.fixture(scope="module")
def tensor(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two workers that share each layer; one of them is killed in the end."""
    folder = tmp_path_factory.mktemp("tensor")
    return start(folder, "tensor", without=BEGINNING, dies=True, tensor_parallel_size=2, **HOSTILE)


def test_tensor_parallel_workers_act_as_one(alone: Found, plain: Found, tensor: Found) -> None:
    found = tensor
    check(found, alone, BEGINNING)
    check(found, plain, BEGINNING)
    assert found.document["preempted"] > 0
    assert found.document["requests"][SHARING]["children"][0]["cached"] == BLOCK
    assert len(found.document["stats"]) == 2
    for said, site in zip(found.document["said"], ("layers.1.mlp_act", "layers.4.q"), strict=False):
        assert f"SteeringError: {site} is not steered under tensor parallelism: each rank holds" in said
        assert "tensor_parallel_size=1" in said
        assert "\n" not in said


def test_a_worker_that_is_killed_ends_every_call_with_one_error(tensor: Found) -> None:
    died = tensor.document["died"]
    assert died["generating"][0] == "RuntimeError"  # vLLM's own
    for name in ("collect", "register"):
        kind, message = died[name]
        assert kind == "BackendError"
        assert "the engine has died" in message
        assert "start it again" in message
        assert "\n" not in message


def check_stages(found: Found) -> None:
    """A row comes from the stage that holds the module that it was read at."""
    for key, (_, stage) in found.places.items():
        site = Site.parse(key.split("/")[2])
        if "/full" in key:
            continue
        if site.layer is None:
            expected = 0 if site.point == "embed" else 1
        else:  # what a block receives is read where the block before it ends
            expected = int((site.layer - (site.point == "resid_pre")) >= LAYERS // 2)
        assert stage == expected, key


@pytest.mark.full
def test_pipeline_stages_act_as_one(plain: Found, tmp_path: Path) -> None:
    found = start(tmp_path, "pipeline", pipeline_parallel_size=2)
    check(found, plain)
    check_stages(found)


@pytest.mark.full
def test_data_parallel_engines_share_steerings_and_requests(plain: Found, tmp_path: Path) -> None:
    found = start(tmp_path, "data", "async", data_parallel_size=2)
    check(found, plain)
    assert len(found.document["stats"]) == 2
    for engine in found.document["stats"]:
        assert engine["registered"] == 6  # what a request names, and two that none does
        assert max(engine["taps"].values()) > 0  # it ran some of the requests


@pytest.mark.full
def test_workers_of_rays_executor_act_as_one(plain: Found, tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'trimtab[ray]'")
    found = start(tmp_path, "ray", "ray", pipeline_parallel_size=2, distributed_executor_backend="ray")
    check(found, plain)
    check_stages(found)


class Held:
    """What the state of a worker does for its answers."""

    def __init__(self) -> None:
        self.map = SimpleNamespace(
            family="qwen3", num_layers=LAYERS, hidden_size=WIDTH, sites=lambda: (), widths=lambda site: 128
        )
        self.config, self.steered, self.recorded, self.tap_of = PluginConfig(), (), (), {}
        self.nbytes, self.graphs, self.dropped = 0, False, 0
        self.labels: set[str] = set()
        self.busy: set[str] = set()
        self.said: list[tuple[str, str]] = []

    def collect(self, labels: list[str]) -> dict[str, list[Left]]:
        found = [label for label in labels if label in self.labels]
        self.labels -= set(found)
        return {label: [Left(label, f"{label}-{id(self)}", None, 1, 1, 0)] for label in found}

    def register(self, payload: bytes) -> str:
        digest = Steering.loads(payload, name="it").digest
        self.said.append(("register", digest))
        return digest

    def bytes_of(self, digest: str) -> int:
        return 0

    def forget(self, digests: list[str]) -> None:
        if self.busy & set(digests):
            raise BackendError("in use")
        self.said.extend(("forget", digest) for digest in digests)


class Fake:
    """Engines of several workers each, that answer a client as real ones do."""

    def __init__(self, engines: list[int]) -> None:
        self.held = [Held() for _ in engines]
        self.workers: list[Any] = [
            SimpleNamespace(state=held, tp_rank=0, pp_rank=0, engine=engine, workers=engines.count(engine))
            for held, engine in zip(self.held, engines, strict=True)
        ]

    def collective_rpc(self, method: str, args: tuple[str, bytes]) -> list[bytes]:
        return [answer(worker, *args) for worker in self.workers]


def request(label: str) -> dict[str, Any]:
    return {KEY: RequestData(label=label).to_wire()}


def keep(fake: Fake, *labels: set[str]) -> None:
    for held, mine in zip(fake.held, labels, strict=True):
        held.labels = set(mine)


def test_a_request_is_collected_from_the_engine_that_ran_it() -> None:
    fake = Fake([0, 1])
    client = Client(fake)
    keep(fake, {"a", "both"}, {"b", "both"})
    found = client.collect([request(label) for label in ("b", "a", "both")])
    assert [[report.label for report in one] for one in found] == [["b"], ["a"], ["both", "both"]]


def test_a_request_that_no_engine_has_costs_the_others_nothing() -> None:
    fake = Fake([0, 1])
    client = Client(fake)
    keep(fake, {"a"}, {"b"})
    with pytest.raises(BackendError, match="'c' is not kept in any engine: no request had it"):
        client.collect([request("a"), request("c"), request("b")])
    assert [report.label for (report,) in client.collect([request("a"), request("b")])] == ["a", "b"]
    with pytest.raises(BackendError, match="'a' is not kept"):
        client.collect([request("a")])


def test_a_request_that_a_worker_of_its_engine_lost_is_refused() -> None:
    fake = Fake([0, 0, 1])
    client = Client(fake)
    keep(fake, {"a"}, set(), {"b"})
    fake.held[1].dropped = 3
    with pytest.raises(BackendError, match="'a' is not kept in some workers of its engine: 3 results were dropped"):
        client.collect([request("b"), request("a")])
    assert len(client.collect([request("b")])) == 1


def test_an_engine_of_which_some_workers_are_out_of_reach_is_refused() -> None:
    fake = Fake([0, 0])
    del fake.workers[1]
    with pytest.raises(BackendError, match="1 of the 2 workers of this engine answer this process"):
        Client(fake)


def test_a_steering_that_one_engine_still_uses_is_sent_again_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.backends.vllm.client.MAX_REGISTERED", 1)
    fake = Fake([0, 1])
    client = Client(fake)
    first, second = (Steering({"layers.1.resid_post": [Add(direction(seed), scale=1.0)]}) for seed in (1, 2))
    used, idle = fake.held
    used.busy = {first.digest}
    for steering in (first, second, first):
        client.register(steering)
    assert idle.said == [
        ("register", first.digest),
        ("register", second.digest),
        ("forget", first.digest),  # the other engine still uses it: it is registered in one only
        ("register", first.digest),
        ("forget", second.digest),
    ]
    used.busy = set()
    client.register(second)
    assert used.said[-1] == idle.said[-1] == ("forget", first.digest)


def test_a_steering_that_only_some_stages_take_is_known_to_none() -> None:
    said: list[tuple[str, bytes]] = []

    class Core:
        def collective_rpc(self, method: str, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[bytes]:
            said.append(args)
            if args[0] == "register":
                return [
                    wire.to_bytes({"digest": "d"}),
                    wire.to_bytes({"error": "SteeringError", "message": "too many"}),
                ]
            return [wire.to_bytes({})] * 2

    core, known = Core(), {"other"}
    watch(core, Admission(4, "wait", known), known)
    answers = core.collective_rpc("trimtab", None, ("register", b""))
    assert [sorted(wire.from_bytes(one)) for one in answers] == [["digest"], ["error", "message"]]
    assert known == {"other"}
    assert said[-1] == ("forget", wire.to_bytes({"digests": ["d"]}))
