"""Many requests with random steerings, captures and aborts leave an engine as they found it, each with its own dose."""

from __future__ import annotations

import gc
import random
from typing import Any

import psutil
import pytest
import torch

from tests.vllm import _engine as engine
from trimtab.steering import Add, Steering

pytestmark = engine.MARKS
WIDTH, SITE, POOL, SLOTS = 128, "layers.1.resid_post", 40, 8
SELECTIONS = ("all", "generated", "last_prompt", "prompt", "1:6", "tokens{10,20,30,40,50}")


def vector(number: int) -> torch.Tensor:
    """Return a direction whose norm names it."""
    drawn = torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))
    return drawn / drawn.norm() * (1 + number / 4)


class Crowd:
    """Keeps some requests in flight, and looks at each that ends."""

    def __init__(self, model: str) -> None:
        settings = {"sites": ["layers.*.resid_post"], "max_steering": SLOTS}
        more = {"num_gpu_blocks_override": 24, "block_size": 32, "enable_prefix_caching": True}
        self.llm = engine.start(model, settings, max_num_batched_tokens=64, **more)
        self.client, self.inner = engine.attached(self.llm), self.llm.llm_engine
        self.pool = [Steering({SITE: [Add(vector(n))]}, positions=SELECTIONS[n % 6]) for n in range(POOL)]
        self.draw, self.wrong, self.aborted, self.number = random.Random(0), [], 0, 0
        self.flying: dict[str, tuple[int | None, Any, bool]] = {}
        self.read = 0

    def ask(self) -> None:
        draw, name = self.draw, f"r{self.number}"
        self.number += 1
        chosen = draw.choice([None, *range(POOL)]) if draw.random() < 0.9 else None
        recorded, full = draw.random() < 0.3, draw.random() < 0.5
        settings = {"temperature": 0, "max_tokens": draw.choice((1, 2, 5, 9)), "ignore_eos": True, "detokenize": False}
        if chosen is None and not recorded:
            params: Any = engine.sampling(**settings)
        else:
            params = self.client.params(
                None if chosen is None else self.pool[chosen],
                sites=[SITE] if recorded else [],
                edit=("before", "after"),
                dose="full" if full and chosen is not None else "counts",
                **settings,
            )
            self.flying[name] = (chosen, params, recorded)
        prompt = engine.prompts(1, draw.randint(1, 90), draw.randrange(20))[0]
        self.inner.add_request(name, {"prompt_token_ids": prompt}, params)

    def run(self, count: int) -> None:
        last, waiting = self.number + count, set[str]()
        while self.number < last or self.inner.has_unfinished_requests():
            while self.number < last and len(waiting) < 24:
                waiting.add(f"r{self.number}")
                self.ask()
            if self.draw.random() < 0.15 and waiting:
                self.abort(self.draw.choice(sorted(waiting)), waiting)
            for output in self.inner.step():
                if output.finished:
                    waiting.discard(output.request_id)
                    self.look(output)

    def abort(self, name: str, waiting: set[str]) -> None:
        self.inner.abort_request([name])
        waiting.discard(name)
        entry = self.flying.pop(name, None)
        if entry is not None:
            self.client.discard([entry[1]])
        self.aborted += 1

    def look(self, output: Any) -> None:
        entry = self.flying.pop(output.request_id, None)
        if entry is None:
            return
        chosen, params, recorded = entry
        ((report,),) = self.client.collect([params])
        self.read += 1
        wanted = None if chosen is None else self.pool[chosen].digest
        said = [] if report.digest == wanted else [f"digest {report.digest} instead of {wanted}"]
        said += [f"{op.rows} rows of {op.selected}" for op in report.ops if op.selected not in (None, op.rows)]
        if chosen is not None:
            size = float(vector(chosen).norm())
            for _, values in report.full.values():
                moved = values[:, 1] - values[:, 0]
                said += [f"moved by {moved}, not {size}"] * (not torch.allclose(moved, torch.tensor(size), atol=1e-3))
        if recorded:
            rows = {held.edit: held.rows for held in report.captured}
            moved = rows["after"] - rows["before"]
            steered = moved.abs().amax(dim=1) > 0
            expected = torch.zeros_like(moved) if chosen is None else vector(chosen) * steered[:, None]
            acted = sum(op.rows for op in report.ops)
            if not torch.allclose(moved, expected, atol=1e-4) or int(steered.sum()) != acted:
                said.append(f"{int(steered.sum())} rows moved, {acted} counted")
        self.wrong += [f"{output.request_id}: {one}" for one in said]

    def held(self) -> dict[str, Any]:
        engine.generate(self.llm, [[9, 9]], engine.sampling(max_tokens=2))  # a pass that tells who has ended
        gc.collect()
        (stats,) = self.client.stats()
        me = psutil.Process()
        return {
            "rss": me.memory_info().rss,
            "objects": len(gc.get_objects()),
            "threads": me.num_threads(),
            "files": me.num_fds(),
            "shared": sum(one.path.startswith("/dev/shm") for one in me.memory_maps()),
            "blocks": self.inner.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            "admission": stats["admission"] | {"refused": 0},
            **{
                key: stats[key] for key in ("active", "tracked", "left", "left_bytes", "recorded_bytes", "buffer_bytes")
            },
        }


def run(model: str, count: int) -> dict[str, Any]:
    crowd = Crowd(model)
    crowd.run(150)
    before = crowd.held()
    crowd.run(count)
    wrong = crowd.wrong[:20]
    return {"before": before, "after": crowd.held(), "wrong": wrong, "aborted": crowd.aborted, "read": crowd.read}


def check(found: dict[str, Any], count: int) -> None:
    assert found["wrong"] == []
    assert found["aborted"] > count / 50
    assert found["read"] > count / 2
    before, after = found["before"], found["after"]
    # stock vLLM grows by some 2 KiB for each of these requests; caches of both fill up, and then no object stays behind
    grown = (after.pop("rss") - before.pop("rss")) / 2**20
    assert grown < 24 + count * 5 / 1024, f"{grown:.1f} MiB"
    assert after.pop("objects") < before.pop("objects") + 6000
    assert after == before
    assert (after["active"], after["tracked"], after["left"], after["recorded_bytes"]) == (0, 0, 0, 0)
    assert after["admission"]["waiting"] == after["admission"]["active"] == 0


def test_hundreds_of_requests_leave_an_engine_as_they_found_it(tmp_path: Any) -> None:
    check(engine.call(run, engine.save("qwen3", tmp_path / "model"), 300, cwd=tmp_path), 300)


@pytest.mark.full
def test_ten_thousand_requests_leave_an_engine_as_they_found_it(tmp_path: Any) -> None:
    check(engine.call(run, engine.save("qwen3", tmp_path / "model"), 10_000, cwd=tmp_path), 10_000)
