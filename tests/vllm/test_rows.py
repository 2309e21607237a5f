"""Every row of every request, however the engine schedules it: chunks, preemptions, cached prefixes, aborts, n > 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.vllm import _engine as engine
from trimtab.backends.vllm.runners.v1 import RunnerV1
from trimtab.numerics.tolerances import engine_row_rel_l2
from trimtab.steering import Add, Cap, Positions, Steering

pytestmark = engine.MARKS
WIDTH, SITE = 128, "layers.*.resid_post"
PLUGIN = {"sites": [SITE], "max_steering": 64, "keys_per_steering": 4}
SELECTIONS = (
    "all",
    "generated",
    "last_prompt",
    "prompt",
    "3:9",
    "-4:",
    "tokens{10,20,30,40,50,60,70}",
    "20:45",
    "all,!2:30",
)
GENERATED = (33, 1, 2)
HOSTILE = {
    "block_size": 32,
    "max_model_len": 128,
    "num_gpu_blocks_override": 7,  # 224 tokens for requests that need some 1500
    "max_num_batched_tokens": 24,  # most prompts are longer
}


class Asked:
    """One request: its own direction, selection, length and number of tokens to make."""

    def __init__(self, number: int) -> None:
        vector = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(number))
        self.selection = SELECTIONS[number % len(SELECTIONS)]
        self.steered, self.captured = number % 5 != 4, number % 2 == 0
        length = 12 + (number * 13) % 50
        # some prompts begin alike, so that a prefix cache has something to give
        self.prompt = (engine.prompts(1, 32)[0] + engine.prompts(1, length, number)[0])[-length - 16 * (number % 3) :]
        self.tokens = GENERATED[(number + number // len(SELECTIONS)) % 3]  # every selection meets every length
        ops = {"layers.1.resid_post": [Add(vector[0], scale=0.4), Cap(vector[1], max=-0.2)]}
        self.steering = Steering(ops, positions=self.selection) if self.steered else None
        self.dose = "full" if number % 3 == 1 and self.steered else "counts"

    def params(self, client: Any, **more: Any) -> Any:
        settings = {"temperature": 0, "max_tokens": self.tokens, "ignore_eos": True, "detokenize": False} | more
        if not self.steered and not self.captured:
            return engine.sampling(**settings)
        return client.params(self.steering, sites=[SITE] if self.captured else [], dose=self.dose, **settings)

    def selected(self, made: list[int], first: int = 0) -> list[int]:
        """Return the positions that its steering selects among the rows from `first` on, one by one."""
        ids = (self.prompt + made)[: len(self.prompt) + len(made) - 1]
        where = Positions.parse(self.selection)
        return [
            place
            for place in range(first, len(ids))
            if where.mask(torch.tensor([place]), len(self.prompt), torch.tensor([ids[place]]))
        ]


def check(asked: Asked, made: list[int], report: Any, alone: dict[str, torch.Tensor] | None) -> list[str]:
    """Return what is wrong with the report of a request."""
    count, wrong = len(asked.prompt) + len(made) - 1, []
    if report.rows != count:
        wrong.append(f"{report.rows} rows of {count}")
    expected = asked.selected(made, report.cached) if asked.steered else []
    for op in report.ops:
        if op.rows != len(expected) or op.selected not in (None, len(expected)):
            wrong.append(f"{op.op} acted at {op.rows} rows, selected {op.selected}, of {len(expected)}")
    if len(report.ops) != (2 if asked.steered else 0):
        wrong.append(f"{len(report.ops)} ops")
    if report.digest != (asked.steering.digest if asked.steering else None):
        wrong.append(f"digest {report.digest}")
    if asked.dose == "full":
        wrong += [f"full dose at {at}" for at, _ in report.full.values() if list(at) != expected]
        wrong += ["no full dose"] if expected and len(report.full) != 2 else []
    if asked.captured and len(report.captured) != 3:
        wrong.append(f"{len(report.captured)} sites")
    for held in report.captured:
        if report.cached or list(held.positions) != list(range(count)):
            wrong.append(f"{held.site}: positions {held.positions}, {report.cached} cached")
        elif alone is not None:
            reference = alone[str(held.site)].double()
            error = (held.rows.double() - reference).norm(dim=1) / reference.norm(dim=1)
            assert held.site.layer is not None
            if not float(error.max()) < engine_row_rel_l2("float32", held.site.layer):
                wrong.append(f"{held.site}: row {int(error.argmax())} is off by {float(error.max()):.1e}")
    return wrong


def run(model: str, count: int, engines: list[dict[str, Any]]) -> dict[str, Any]:
    """Run each request alone in a plain engine, then all of them at once in others; return what is wrong."""
    every = [Asked(number) for number in sorted(range(count), key=lambda number: (number % 3 != 2, number))]
    llm = engine.start(model, PLUGIN)
    client = engine.attached(llm)
    made, rows, wrong, facts = [], [], {}, []
    filled = tables_filled(llm)
    for number, asked in enumerate(every):
        params = asked.params(client)
        made += engine.tokens(engine.generate(llm, [asked.prompt], params))
        rows.append({})
        if asked.steered or asked.captured:
            ((report,),) = client.collect([params])
            rows[-1] = {str(held.site): held.rows for held in report.captured}
            wrong[f"alone/{number}"] = check(asked, made[-1], report, None)
    del llm, client
    engine.stop()
    for number, settings in enumerate(engines):
        llm = engine.start(model, PLUGIN, **settings)
        facts.append(at_once(llm, every, made, rows, wrong, f"engine {number}"))
        facts[-1] |= children(llm, wrong, f"engine {number}")
        facts[-1] |= aborted(llm, every, made, rows, wrong, f"engine {number}")
        extended = bool(settings.get("worker_extension_cls"))
        facts[-1]["extension"] = llm.collective_rpc("from_elsewhere") if extended else []
        del llm
        engine.stop()
    return {"wrong": {name: said for name, said in wrong.items() if said}, "facts": facts, "filled": filled}


def tables_filled(llm: Any) -> int:
    """Run requests whose passes are alike; return how many of them looked at the batch and filled the tables anew."""
    client, looked, batch = engine.attached(llm), [], RunnerV1._batch

    def counted(runner: Any) -> Any:
        looked.append(runner)
        return batch(runner)

    asked = [Asked(0), Asked(18)]  # they select all of their rows
    with patch.object(RunnerV1, "_batch", staticmethod(counted)):
        params = [one.params(client, max_tokens=33) for one in asked]
        engine.generate(llm, [engine.prompts(1, 20)[0] for _ in asked], params)
    client.discard(params)
    return len(looked)


def at_once(llm: Any, every: list[Asked], made: list[Any], rows: list[Any], wrong: dict[str, Any], name: str) -> Any:
    """Run all requests together; return how often the engine preempted one, and took rows from its cache."""
    client, scheduler = engine.attached(llm), llm.llm_engine.engine_core.engine_core.scheduler
    preempted, stock = [], scheduler._preempt_request
    scheduler._preempt_request = lambda request, *more, **named: (
        preempted.append(request.request_id.rpartition("-")[0]),  # vLLM appends to the name that it gave
        stock(request, *more, **named),
    )[1]
    engine.generate(llm, [[*engine.prompts(1, 32)[0], 9, 9]], engine.sampling(max_tokens=2))  # what several begin with
    params = [asked.params(client) for asked in every]
    outputs = engine.generate(llm, [asked.prompt for asked in every], params)
    reports = iter(
        client.collect([one for one, asked in zip(params, every, strict=True) if asked.steered or asked.captured])
    )
    cached, compared = 0, 0
    for number, (asked, output) in enumerate(zip(every, outputs, strict=True)):
        said = []
        if list(output.outputs[0].token_ids) != made[number]:
            said.append(f"tokens {list(output.outputs[0].token_ids)} instead of {made[number]}")
        if asked.steered or asked.captured:
            (report,) = next(reports)
            said += check(asked, list(output.outputs[0].token_ids), report, rows[number])
            cached += report.cached
            if output.request_id not in preempted:  # of the others vLLM counts what they found when they came back
                compared += report.cached > 0
                if report.cached != output.num_cached_tokens:
                    said.append(f"{report.cached} cached rows, {output.num_cached_tokens} by vLLM")
        wrong[f"{name}/{number}"] = said
    del scheduler._preempt_request
    return {"preempted": len(preempted), "cached": cached, "compared": compared}


def children(llm: Any, wrong: dict[str, Any], name: str) -> dict[str, Any]:
    """Run a request of three children with a prompt of whole blocks; each of them computes all of its rows."""
    client, asked = engine.attached(llm), Asked(1)
    asked.prompt, asked.tokens, asked.captured, asked.dose = engine.prompts(1, 64, 9)[0], 6, True, "full"
    params = asked.params(client, n=3, temperature=1.0)
    (output,) = engine.generate(llm, [asked.prompt], params)
    (reports,) = client.collect([params])
    said = [] if len(reports) == 3 else [f"{len(reports)} reports of 3 children"]
    for completion, report in zip(output.outputs, reports, strict=False):
        tokens = list(completion.token_ids)
        again = asked.params(client, forced=tokens)
        if engine.tokens(engine.generate(llm, [asked.prompt], again)) != [tokens]:
            said.append("forced tokens were not followed")
        ((alone,),) = client.collect([again])
        said += check(asked, tokens, report, {str(held.site): held.rows for held in alone.captured})
    wrong[f"{name}/children"] = said
    return {"children": len({tuple(one.token_ids) for one in output.outputs})}


def aborted(llm: Any, every: list[Asked], made: list[Any], rows: list[Any], wrong: dict[str, Any], name: str) -> Any:
    """Abort requests while they run and while they wait; the others do not notice, and nothing is left behind."""
    client, inner = engine.attached(llm), llm.llm_engine
    chosen = [number for number in range(len(every)) if made[number][2:] and (every[number].steered)]
    params = {f"abort-{number}": every[number].params(client) for number in chosen}
    for number in chosen:
        inner.add_request(f"abort-{number}", {"prompt_token_ids": every[number].prompt}, params[f"abort-{number}"])
    gone, done, steps = [f"abort-{number}" for number in (chosen[0], chosen[-1])], {}, 0
    while inner.has_unfinished_requests():
        if steps == 4:
            inner.abort_request(gone)
        steps += 1
        done |= {one.request_id: one for one in inner.step() if one.finished}
    said = [f"{one} ended" for one in gone if one in done and done[one].outputs[0].finish_reason != "abort"]
    for number in chosen[1:-1]:
        one = f"abort-{number}"
        if list(done[one].outputs[0].token_ids) != made[number]:
            said.append(f"{one}: tokens {list(done[one].outputs[0].token_ids)} instead of {made[number]}")
        ((report,),) = client.collect([params[one]])
        said += check(every[number], made[number], report, rows[number])
    client.discard([params[one] for one in gone])
    engine.generate(llm, [[9, 9]], engine.sampling(max_tokens=2))  # a pass that tells the worker who has ended
    (stats,) = client.stats()
    said += [f"{key} is {stats[key]}" for key in ("active", "tracked", "left", "recorded_bytes") if stats[key]]
    wrong[f"{name}/aborted"] = said
    return {"aborted": len(gone)}


def test_every_row_is_right_however_the_engine_schedules_it(tmp_path: Path) -> None:
    every = [Asked(number) for number in range(27)]
    assert {one.tokens for one in every if one.captured and one.steered} == set(GENERATED)
    assert {(one.selection, one.tokens) for one in every} == {(one, n) for one in SELECTIONS for n in GENERATED}
    model = engine.save("qwen3", tmp_path / "model")
    extended = {"worker_extension_cls": "tests.vllm._engine.Extension"}
    engines = [HOSTILE | {"enable_prefix_caching": True}, HOSTILE | extended | {"async_scheduling": False}]
    found = engine.call(run, model, 27, engines, cwd=tmp_path)
    assert not found["wrong"]
    assert 1 <= found["filled"] <= 3  # of 33 passes
    caching, plain = found["facts"]
    assert [one["extension"] for one in found["facts"]] == [[], ["here"]]
    assert min(caching["preempted"], plain["preempted"]) >= 2
    assert caching["cached"] > 0 == plain["cached"]
    assert caching["compared"] > 0
    assert caching["children"] == plain["children"] == 3


@pytest.mark.full
def test_every_row_is_right_in_other_engines(tmp_path: Path) -> None:
    model = engine.save("gemma3", tmp_path / "model")
    hostile = HOSTILE | {"num_gpu_blocks_override": 13}  # blocks of two kinds: of sliding and of full attention
    small = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    engines = [
        hostile | {"enable_prefix_caching": True, "enforce_eager": False},
        {"enable_prefix_caching": True, "block_size": 32},
        hostile | small,
        {"block_size": 32, "num_gpu_blocks_override": 33, "enable_prefix_caching": True},
    ]
    found = engine.call(run, model, 54, engines, cwd=tmp_path)
    assert not found["wrong"]
    compiled, cached, few, full = found["facts"]
    assert min(one["preempted"] for one in (compiled, few)) >= 1
    assert min(one["cached"] for one in (compiled, cached, full)) > 0 == few["cached"]
