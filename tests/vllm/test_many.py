"""Many requests with random steerings, captures and aborts leave an engine as they found it, each with its own dose.

Steerings are of one to three layers and five ops; requests have one or two children, are recorded whole or reduced, and
follow tokens. Which vectors acted is seen in the states before and after an op: the reference makes one of the other.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from tests.vllm import _engine as engine
from trimtab.errors import BackendError
from trimtab.sites import Site
from trimtab.steering import Ablate, Add, Cap, LowRank, Op, Patch, Positions, Steering

pytestmark = engine.MARKS
WIDTH, LAYERS, POOL, SLOTS = 128, 3, 30, 8
SITES = tuple(Site.parse(f"layers.{layer}.resid_post") for layer in range(LAYERS))
SELECTIONS = ("all", "generated", "last_prompt", "prompt", "1:6", "tokens{10,20,30,40,50}")
STATES = ("before", "after")


def vector(number: int, layer: int) -> Tensor:
    """Return a direction whose norm names its steering."""
    drawn = torch.randn(WIDTH, generator=torch.Generator().manual_seed(LAYERS * number + layer))
    return drawn / drawn.norm() * (1 + number / 4)


def op(number: int, layer: int) -> Op:
    """Return one of five ops on a direction of its own."""
    v = vector(number, layer)
    return (
        Add(v),
        Cap(v, min=-0.1, max=0.1 + number / 100),
        Ablate(v, keep=-0.5),
        Patch(v, weight=0.25),
        LowRank((v / v.norm())[None] / 8, torch.ones(1), v[:, None] / 8),
    )[(number + layer) % 5]


def steering(number: int) -> Steering:
    layers = random.Random(number).sample(range(LAYERS), 1 + number % LAYERS)
    return Steering({str(SITES[layer]): [op(number, layer)] for layer in layers}, positions=SELECTIONS[number % 6])


POOLED = [steering(number) for number in range(POOL)]
PROGRAMS = [one.resolve(num_layers=LAYERS, hidden_size=WIDTH) for one in POOLED]
for each in PROGRAMS:
    for program in each.values():
        program.prepare(torch.device("cpu"), torch.float32)  # so that nothing is made once requests are counted


@dataclass(frozen=True)
class Asked:
    """One request in flight."""

    chosen: int | None
    """Number of its steering."""
    params: Any
    prompt: list[int]
    recorded: bool
    reduced: bool
    full: bool
    forced: list[int] | None

    def program(self) -> Any:
        return {} if self.chosen is None else PROGRAMS[self.chosen]

    def selected(self, ids: list[int]) -> Tensor:
        """Return which rows its steering selects: bool [len(ids)]."""
        if self.chosen is None:
            return torch.zeros(len(ids), dtype=torch.bool)
        where = Positions.parse(SELECTIONS[self.chosen % 6])
        return where.mask(torch.arange(len(ids)), len(self.prompt), torch.tensor(ids))

    def wrong(self, tokens: list[int], report: Any) -> list[str]:
        """Return what is wrong with the report of a child that made these tokens."""
        ids = (self.prompt + tokens)[: len(self.prompt) + len(tokens) - 1]
        chosen = self.selected(ids)
        acted = torch.nonzero(chosen[report.cached :])[:, 0] + report.cached
        said = self.named(report)
        said += [f"{report.rows} rows of {len(ids)}"] * (report.rows != len(ids))
        said += [f"{tokens} instead of {self.forced}"] * (self.forced not in (None, tokens))
        wanted = [(str(site), step.name) for site, one in self.program().items() for step in one.steps]
        said += [f"ops {report.ops}"] * ([(one.site, one.op) for one in report.ops] != wanted)
        for one in report.ops:
            if one.rows != len(acted) or one.selected not in (None, len(acted)):
                said.append(f"{one.op} at {one.rows} rows, selected {one.selected}, of {len(acted)}")
        if self.full and len(acted):
            said += [f"full doses {set(report.full)}"] * (len(report.full) != len(wanted))
        for (site, number), (at, values) in report.full.items():
            said += self.measured(self.program()[Site.parse(site)].steps[number].op, values)
            said += [f"measured at {at}, not {acted}"] * (list(at) != acted.tolist())
        if self.recorded:
            said += self.moved(report, ids, chosen)
            said += [f"{report.cached} rows were not recorded"] * (report.cached != 0)
            said += [f"{held.positions}" for held in report.captured if held.positions != tuple(range(len(ids)))]
            said += [f"{len(report.captured)} states"] * (len(report.captured) != 2 * LAYERS)
        return said

    def named(self, report: Any) -> list[str]:
        wanted = None if self.chosen is None else POOLED[self.chosen].digest
        return [] if report.digest == wanted else [f"digest {report.digest} instead of {wanted}"]

    def measured(self, op: Op, values: Tensor) -> list[str]:
        """Compare a full dose with what the op does to any projection."""
        before, after = values[:, 0], values[:, 1]
        if isinstance(op, Add):
            good = torch.allclose(after - before, op.vector.norm(), atol=1e-3)
        elif isinstance(op, Cap):
            good = torch.allclose(after, before.clamp(op.min, op.max), atol=1e-3)
        elif isinstance(op, Ablate):
            good = torch.allclose(after, before * op.keep, atol=1e-3)
        else:
            good = True  # no direction to measure along
        return [] if good else [f"{op.kind}: {before} became {after}"]

    def moved(self, report: Any, ids: list[int], chosen: Tensor) -> list[str]:
        """Compare recorded states after the ops with what the reference makes of those before them."""
        held, said = {(one.site, one.edit): one.rows for one in report.captured}, []
        for site in SITES:
            before, after = held[site, "before"], held[site, "after"]
            program = self.program().get(site)
            if self.reduced:
                ops = [] if program is None else [step.op for step in program.steps]
                if all(isinstance(op, Add) for op in ops):  # of the others a mean says less than it takes
                    share = chosen.double().mean()
                    wanted = sum((share * op.vector for op in ops), torch.zeros(WIDTH, dtype=torch.float64))
                    if not torch.allclose((after - before).double()[0], wanted, atol=1e-4):
                        said.append(f"{site}: the mean moved by {(after - before).norm():.2e}")
                continue
            wanted, count = before, len(before)
            if program is not None and count:
                rows = {"positions": torch.arange(count), "token_ids": torch.tensor(ids[:count])}
                wanted = program.apply(before, prompt_length=len(self.prompt), **rows).h
            still = (before == after).all(dim=1)
            if not torch.allclose(after, wanted, rtol=1e-5, atol=1e-4) or not still[~chosen[:count]].all():
                said.append(f"{site}: off by {(after - wanted).abs().max():.2e}, {(~still).sum()} rows moved")
            if program is not None and not isinstance(program.steps[0].op, Cap) and still[chosen[:count]].any():
                said.append(f"{site}: a row that was selected did not move")
        return said


class Crowd:
    """Keeps some requests in flight, and looks at each that ends."""

    def __init__(self, model: str, **more: Any) -> None:
        settings = {"sites": ["layers.*.resid_post"], "max_steering": SLOTS}
        more |= {"num_gpu_blocks_override": 24, "block_size": 32, "enable_prefix_caching": True}
        self.llm = engine.start(model, settings, max_num_batched_tokens=64, **more)
        self.client, self.inner = engine.attached(self.llm), self.llm.llm_engine
        self.draw, self.wrong, self.aborted, self.number = random.Random(0), [], 0, 0
        self.flying: dict[str, Asked] = {}
        self.read: Counter[str] = Counter()

    def ask(self) -> None:
        from vllm.sampling_params import RequestOutputKind

        draw, name = self.draw, f"r{self.number}"
        self.number += 1
        chosen = draw.choice([None, *range(POOL)]) if draw.random() < 0.9 else None
        recorded, full, several = draw.random() < 0.3, draw.random() < 0.5, draw.random() < 0.2
        count = draw.choice((1, 2, 5, 9))
        forced = [draw.randrange(8, 120) for _ in range(count)] if draw.random() < 0.2 else None
        reduced = recorded and draw.random() < 0.4
        settings = {"max_tokens": count, "ignore_eos": True, "detokenize": False}
        settings |= {"n": 2, "temperature": 1.0} if several else {"temperature": 0}
        settings["output_kind"] = RequestOutputKind.FINAL_ONLY  # both children in one output
        prompt = engine.prompts(1, draw.randint(1, 90), draw.randrange(20))[0]
        if chosen is None and not recorded and forced is None:
            params: Any = engine.sampling(**settings)
        else:
            if recorded:
                settings |= {"sites": list(map(str, SITES)), "edit": STATES, "reduce": "mean" if reduced else ""}
            params = self.client.params(
                None if chosen is None else POOLED[chosen],
                forced=forced,
                dose="full" if full and chosen is not None else "counts",
                **settings,
            )
            self.flying[name] = Asked(chosen, params, prompt, recorded, reduced, full, forced)
        self.inner.add_request(name, {"prompt_token_ids": prompt}, params)

    def run(self, count: int) -> None:
        last, waiting = self.number + count, set[str]()
        while self.number < last or self.inner.has_unfinished_requests():
            while self.number < last and len(waiting) < 24:
                waiting.add(f"r{self.number}")
                self.ask()
            if self.draw.random() < 0.15 and waiting:
                oldest = min(waiting, key=lambda name: int(name[1:]))  # which is no longer in the queue
                self.abort(self.draw.choice([oldest, self.draw.choice(sorted(waiting))]), waiting)
            if not self.inner.has_unfinished_requests():
                continue  # an engine in another process would be waited for
            for output in self.inner.step():
                if output.finished:
                    waiting.discard(output.request_id)
                    self.look(output)

    def abort(self, name: str, waiting: set[str]) -> None:
        """Abort a request; every other one is brought home as far as it came."""
        self.inner.abort_request([name])
        parents = self.inner.output_processor.parent_requests
        for parent in [one for one, held in parents.items() if held.external_req_id == name]:
            del parents[parent]  # vLLM keeps it when it aborts the children
        waiting.discard(name)
        self.aborted += 1
        asked = self.flying.pop(name, None)
        if asked is None:
            return
        if self.draw.random() < 0.5:
            self.client.discard([asked.params])
            return
        try:
            (reports,) = self.client.collect([asked.params])
        except BackendError as error:
            self.wrong += [f"{name}: {error}"] * ("no request had it" not in str(error))  # it still waited for a slot
            return
        for report in reports:
            said = asked.named(report)
            ids = asked.prompt + [0] * (report.rows - len(asked.prompt))  # what it made is not known
            by_token = asked.chosen is not None and SELECTIONS[asked.chosen % 6].startswith("tokens")
            if report.captured and not asked.reduced and not (by_token and report.rows > len(asked.prompt)):
                said += asked.moved(report, ids, asked.selected(ids))
                self.read["aborted, recorded"] += 1
            self.read["aborted"] += 1
            self.wrong += [f"{name}, aborted: {one}" for one in said]

    def look(self, output: Any) -> None:
        asked = self.flying.pop(output.request_id, None)
        if asked is None:
            return
        (reports,) = self.client.collect([asked.params])
        self.read.update(["requests", *(op.op for op in reports[0].ops)])
        self.read.update(name for name in ("recorded", "reduced", "forced") if getattr(asked, name))
        self.read["several"] += len(reports) > 1
        self.read["cached"] += any(report.cached > 0 for report in reports)
        said = [f"{len(reports)} reports"] * (len(reports) != len(output.outputs))
        for made, report in zip(output.outputs, reports, strict=False):
            said += asked.wrong(list(made.token_ids), report)
        self.wrong += [f"{output.request_id}: {one}" for one in said]

    def held(self) -> dict[str, Any]:
        engine.generate(self.llm, [[9, 9]], engine.sampling(max_tokens=2))  # a pass that tells who has ended
        gc.collect()
        core = getattr(self.inner.engine_core, "engine_core", None)  # in this process
        found = {
            "objects": len(gc.get_objects()),
            "blocks": core and core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        }
        for number, one in enumerate(processes()):
            found |= {
                f"rss {number}": one.memory_info().rss,
                f"threads {number}": one.num_threads(),
                f"files {number}": one.num_fds(),
                f"shared {number}": len(shared(one)),
            }
        names = ("active", "tracked", "left", "left_bytes", "recorded_bytes", "buffer_bytes")
        for number, stats in enumerate(self.client.stats()):
            found[f"worker {number}"] = {name: stats[name] for name in names}
            found[f"worker {number}"]["admission"] = stats["admission"] | {"refused": 0}
        return found


def processes() -> list[psutil.Process]:
    """Return this process, and all that an engine started."""
    me = psutil.Process()
    return [me, *sorted(me.children(recursive=True), key=lambda one: one.pid)]


def shared(process: psutil.Process) -> set[str]:
    return {one.path for one in process.memory_maps() if one.path.startswith("/dev/shm")}


def run(model: str, count: int, warm: int, more: dict[str, Any]) -> dict[str, Any]:
    """Run requests after others that fill the caches and the pages of shared memory."""
    crowd = Crowd(model, **more)
    crowd.run(warm)
    before = crowd.held()
    crowd.run(count)
    found = {"before": before, "after": crowd.held(), "wrong": crowd.wrong[:20]}
    found |= {"aborted": crowd.aborted, "read": crowd.read}
    started = [one for one in processes()[1:] if "resource_tracker" not in " ".join(one.cmdline())]
    mapped = sorted(set().union(*map(shared, processes())))
    crowd.inner.engine_core.shutdown()
    _, running = psutil.wait_procs(started, 60)
    return found | {"mapped": mapped, "running": [one.pid for one in running]}


def check(found: dict[str, Any], count: int, processes: int = 1, workers: int = 1) -> None:
    assert found["wrong"] == []
    assert found["aborted"] > count / 50
    read = found["read"]
    assert read["requests"] > count / 2
    assert min(read[f"0:{kind}"] for kind in ("Add", "Cap", "Ablate", "Patch", "LowRank")) > count / 20
    assert min(read[kind] for kind in ("recorded", "reduced", "forced", "several")) > count / 30
    assert min(read["aborted"], read["cached"]) > count / 100
    assert read["aborted, recorded"] > 0
    before, after = found["before"], found["after"]
    for name in [name for name in before if name.startswith("rss ")]:
        # stock vLLM grows by some 2 KiB for each of these requests; caches of both fill up, and then no object stays
        grown = (after.pop(name) - before.pop(name)) / 2**20
        assert grown < 24 + count * 5 / 1024, f"{name}: {grown:.1f} MiB"
    assert after.pop("objects") < before.pop("objects") + 6000
    assert after == before
    assert sum(name.startswith("threads ") for name in after) >= processes
    kept = [after[name] for name in after if name.startswith("worker ")]
    assert len(kept) == workers
    for one in kept:
        assert (one["active"], one["tracked"], one["left"], one["recorded_bytes"]) == (0, 0, 0, 0)
        assert one["admission"]["waiting"] == one["admission"]["active"] == 0
    left = [path for path in found["mapped"] if Path(path).exists()]
    assert found["running"] == []
    assert [path for path in left if "-cpushm_" not in path] == []  # those vLLM leaves to the machine on the CPU


def test_hundreds_of_requests_leave_an_engine_as_they_found_it(tmp_path: Any) -> None:
    check(engine.call(run, engine.save("qwen3", tmp_path / "model"), 300, 150, {}, cwd=tmp_path), 300)


@pytest.mark.full
def test_ten_thousand_requests_leave_an_engine_as_they_found_it(tmp_path: Any) -> None:
    check(engine.call(run, engine.save("qwen3", tmp_path / "model"), 10_000, 150, {}, cwd=tmp_path), 10_000)


@pytest.mark.full
def test_requests_leave_every_process_of_an_engine_as_they_found_it(tmp_path: Any) -> None:
    """The engine core has a process of its own, and so has each of two workers."""
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1"}
    model = engine.save("qwen3", tmp_path / "model")
    found = engine.call(run, model, 1000, 1000, {"tensor_parallel_size": 2}, cwd=tmp_path, **apart)
    check(found, 1000, processes=4, workers=2)
    assert found["mapped"]
