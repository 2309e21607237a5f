"""The prefix cache under steering: what is shared, what is not, and how many tokens came from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.vllm import _engine as engine
from trimtab.numerics.tolerances import engine_row_rel_l2
from trimtab.steering import Add, Cap, Steering

pytestmark = engine.MARKS
WIDTH, BLOCK, SITE = 128, 32, "layers.*.resid_post"


def steering(seed: int, positions: str = "all") -> Steering:
    vector = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
    ops = {"layers.0.resid_post": [Add(vector[0], scale=0.5)], "layers.1.resid_post": [Cap(vector[1], max=-0.5)]}
    return Steering(ops, positions=positions)


class Runner:
    """Runs requests on one engine; `empty` runs one as on an engine that has run nothing."""

    def __init__(self, model: str) -> None:
        settings = {"sites": [SITE], "max_steering": 2}
        self.llm = engine.start(model, settings, enable_prefix_caching=True, block_size=BLOCK)
        self.client = engine.attached(self.llm)

    def params(self, one: Steering | None, count: int, **more: Any) -> Any:
        settings = {"temperature": 0, "max_tokens": count, "ignore_eos": True, "logprobs": 4, "detokenize": False}
        return engine.sampling(**settings) if one is None else self.client.params(one, **settings, **more)

    def run(self, asked: list[tuple[list[int], Steering | None]], count: int = 8) -> list[dict[str, Any]]:
        params = [self.params(one, count) for _, one in asked]
        outputs = engine.generate(self.llm, [prompt for prompt, _ in asked], params)
        steered = [one for one, (_, given) in zip(params, asked, strict=True) if given is not None]
        reports = iter(self.client.collect(steered))
        found = []
        for output, (prompt, one) in zip(outputs, asked, strict=True):
            made = output.outputs[0]
            entry = {"tokens": list(made.token_ids), "cached": output.num_cached_tokens, "wrong": []}
            entry["logprobs"] = [step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)]
            if one is not None:
                (report,) = next(reports)
                if report.cached != output.num_cached_tokens or report.rows != len(prompt) + count - 1:
                    entry["wrong"].append(f"{report.cached} cached, {report.rows} rows")
                entry["wrong"] += [
                    f"{op.op}: {op.rows} of {op.selected}" for op in report.ops if op.rows != op.selected
                ]
                entry["rows"] = [op.rows for op in report.ops]
            found.append(entry)
        return found

    def empty(self, prompt: list[int], one: Steering | None, count: int = 8) -> dict[str, Any]:
        assert self.llm.reset_prefix_cache()
        return self.run([(prompt, one)], count)[0]


def turns(runner: Runner) -> dict[str, Any]:
    """A first turn that is steered as it decodes, then second turns on what it left."""
    prompt = engine.prompts(1, 2 * BLOCK, 1)[0]
    first = steering(1, "generated")
    found = {}
    for name, second in (
        ("unsteered", None),
        ("steered otherwise", steering(2)),
        ("steered as it decodes", steering(2, "generated")),
        ("steered alike from there on", steering(1, f"{2 * BLOCK}:")),
        ("steered alike in its prompt", steering(1, "prompt")),
    ):
        made = runner.empty(prompt, first, 41)
        longer = prompt + made["tokens"] + [9, 10, 11]
        (warm,) = runner.run([(longer, second)])
        found[name] = {"warm": warm, "cold": runner.empty(longer, second)}
    return found


def sharing(runner: Runner) -> dict[str, Any]:
    """Requests with one prompt, steered differently, in all orders."""
    prompt = engine.prompts(1, 3 * BLOCK - 10, 2)[0]
    kinds = {"a": steering(3), "b": steering(4), "decode a": steering(3, "generated"), "plain": None}
    found: dict[str, Any] = {"solo": {name: runner.empty(prompt, one) for name, one in kinds.items()}}
    for order in (
        ["a", "b", "plain"],
        ["b", "a"],
        ["plain", "a", "b"],
        ["decode a", "plain", "a"],
        ["plain", "decode a"],
    ):
        assert runner.llm.reset_prefix_cache()
        found[",".join(order)] = [runner.run([(prompt, kinds[name])])[0] for name in order]
    assert runner.llm.reset_prefix_cache()
    together = ["a", "plain", "b", "decode a", "a", "b"]  # three steerings for two slots
    found["together"] = list(zip(together, runner.run([(prompt, kinds[name]) for name in together]), strict=True))
    return found


def captured(runner: Runner) -> dict[str, Any]:
    """A recorded request recomputes rows that the cache holds; so does every child of one.

    What is recorded on top of rows that the cache had is recorded again on an empty one.
    """
    prompt, one = engine.prompts(1, 2 * BLOCK, 3)[0], steering(5)
    assert runner.llm.reset_prefix_cache()
    runner.run([(prompt, one)])
    found: dict[str, Any] = {}
    recorded = {}
    for name, positions, more in (("all", "all", {}), ("generated", "generated", {}), ("children", "all", {"n": 3})):
        settings = {"temperature": 1.0 if more else 0, "max_tokens": 4, "ignore_eos": True, "detokenize": False}
        params = runner.client.params(one, sites=[SITE], positions=positions, **settings, **more)
        engine.generate(runner.llm, [prompt], params)
        (reports,) = runner.client.collect([params])
        found[name] = [[report.cached, [list(held.positions) for held in report.captured]] for report in reports]
        recorded[name] = reports[0]
    warm = recorded["generated"]
    assert runner.llm.reset_prefix_cache()
    params = runner.client.params(
        one, sites=[SITE], positions="generated", temperature=0, max_tokens=4, ignore_eos=True
    )
    engine.generate(runner.llm, [prompt], params)
    ((cold,),) = runner.client.collect([params])
    found["cold"] = [cold.cached, [list(held.positions) for held in cold.captured]]
    found["errors"] = [
        float(((mine.rows - other.rows).double().norm(dim=1) / other.rows.double().norm(dim=1)).max())
        for mine, other in zip(warm.captured, cold.captured, strict=True)
    ]
    return found


def waiting(runner: Runner) -> dict[str, Any]:
    """Five steerings for two slots: all of them run, and as they do alone."""
    prompts = engine.prompts(10, 40, 4)
    asked = [(prompt, steering(10 + number % 5)) for number, prompt in enumerate(prompts)]
    alone = [runner.empty(*one)["tokens"] for one in asked]
    assert runner.llm.reset_prefix_cache()
    together = runner.run(asked)
    engine.generate(runner.llm, [[9, 9]], engine.sampling(max_tokens=2))
    (stats,) = runner.client.stats()
    return {"alone": alone, "together": together, "stats": stats}


def run(model: str) -> dict[str, Any]:
    runner = Runner(model)
    return {one.__name__: one(runner) for one in (turns, sharing, captured, waiting)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cache")
    return engine.call(run, engine.save("qwen3", folder / "model"), cwd=folder)


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    assert not left["wrong"]
    assert not right["wrong"]
    return left["tokens"] == right["tokens"] and left["logprobs"] == pytest.approx(right["logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("unsteered", 2 * BLOCK),
        ("steered otherwise", 0),
        ("steered as it decodes", 2 * BLOCK),
        ("steered alike from there on", 3 * BLOCK),
        ("steered alike in its prompt", 0),
    ],
)
def test_a_second_turn_takes_from_a_steered_one_what_it_would_have_computed(name: str, cached: int, found: Any) -> None:
    one = found["turns"][name]
    assert one["warm"]["cached"] == cached
    assert one["cold"]["cached"] == 0
    assert same(one["warm"], one["cold"])


def test_one_prompt_steered_differently_is_computed_for_each_in_any_order(found: Any) -> None:
    sharing, solo = found["sharing"], found["sharing"]["solo"]
    assert len({tuple(one["tokens"]) for one in solo.values()}) == 4
    cached = {}
    for order, made in sharing.items():
        if order in ("solo", "together"):
            continue
        for name, one in zip(order.split(","), made, strict=True):
            assert same(one, solo[name]), (order, name)
        cached[order] = [one["cached"] for one in made]
    assert cached == {
        "a,b,plain": [0, 0, 0],
        "b,a": [0, 0],
        "plain,a,b": [0, 0, 0],
        "decode a,plain,a": [0, 2 * BLOCK, 0],  # no row of the prompt is steered: it is shared
        "plain,decode a": [0, 2 * BLOCK],
    }
    for name, one in sharing["together"]:
        assert same(one, solo[name]), name


def test_a_recorded_request_computes_every_row_that_it_records(found: Any) -> None:
    rows = 2 * BLOCK + 3
    for name in ("all", "children"):
        assert len(found["captured"][name]) == (3 if name == "children" else 1)
        for cached, held in found["captured"][name]:
            assert cached == 0
            assert held == [list(range(rows))] * 3
    ((cached, held),) = found["captured"]["generated"]
    assert cached == BLOCK  # all that the cache has but the last token of the prompt, in whole blocks
    assert held == [list(range(2 * BLOCK, rows))] * 3


def test_rows_computed_on_cached_ones_are_those_of_an_empty_cache(found: Any) -> None:
    one = found["captured"]
    assert one["generated"][0][0] == BLOCK
    assert one["cold"] == [0, one["generated"][0][1]]
    assert len(one["errors"]) == 3
    for layer, error in enumerate(one["errors"]):
        assert error < engine_row_rel_l2("float32", layer)


def test_steerings_beyond_the_slots_wait_for_one(found: Any) -> None:
    one = found["waiting"]
    assert [made["tokens"] for made in one["together"]] == one["alone"]
    assert not [said for made in one["together"] for said in made["wrong"]]
    assert one["stats"]["admission"] == {"active": 0, "waiting": 0, "refused": 0}
    assert one["stats"]["resident"] == 2
    assert (one["stats"]["active"], one["stats"]["tracked"], one["stats"]["left"]) == (0, 0, 0)
