"""Who is not steered is not changed: bit for bit stock vLLM; and compiled corrections are those of eager ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm import _engine as engine
from trimtab.errors import TrimtabError
from trimtab.sites import Site
from trimtab.steering import (
    Ablate,
    AblateSubspace,
    Add,
    Cap,
    CapSubspace,
    LowRank,
    Op,
    Patch,
    SetProjection,
    Steering,
)

pytestmark = engine.MARKS
COUNT, LENGTH, TOKENS, WIDTH, VOCABULARY = 16, 12, 24, 512, 128
UNSTEERED = 5
SITES = ["layers.*.resid_post"]
BEGINNINGS = ["embed", "layers.*.resid_pre"]
INSIDE = ["layers.*.q", "layers.*.attn_out", "layers.*.resid_mid", "final_norm", "logits"]
MATHS = ("float32", "bfloat16", "float16")
KINDS = ["idle", "mixed", "one", "half", "zero"]
RAW = {"max_logprobs": -1, "logprobs_mode": "raw_logits"}
"""The logits as the model gave them, of every token."""


def to_no_effect(number: int, sites: list[str]) -> Steering:
    """Return a steering that changes nothing, one of eight."""

    def op(width: int) -> Op:
        vector, pair = drawn(number, width)
        return (
            Add(vector, scale=0.0),
            Cap(vector, min=-1e6, max=1e6),
            Ablate(vector, keep=1.0),
            AblateSubspace(pair, keep=1.0),
            CapSubspace(pair, min=-1e6, max=[1e6, None]),
            Add(vector, scale=0.3),
            Patch(vector, weight=0.0),
            LowRank(pair, torch.ones(2), torch.zeros(width, 2)),
        )[number % 8]

    return Steering({site: [op(width(site))] for site in sites}, gain=0.0 if number % 8 == 5 else 1.0)


def to_some_effect(number: int, sites: list[str], hidden: int = WIDTH) -> Steering:
    """Return a steering that changes every request, one of eight."""

    def op(width: int) -> Op:
        vector, pair = drawn(number, width)
        return (
            Add(vector, scale=0.3),
            Cap(vector, max=-0.5),
            Ablate(vector, keep=-1.0),
            AblateSubspace(pair, keep=0.0),
            CapSubspace(pair, min=[0.2, None], max=[0.3, -0.4]),
            SetProjection(vector, value=0.7),
            Patch(vector, weight=0.2),
            LowRank(pair / 16, torch.ones(2), pair.T.contiguous() / 16),
        )[number % 8]

    return Steering({site: [op(width(site, hidden))] for site in sites})


def drawn(number: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a direction, and two."""
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(number))
    return rows[0], rows[1:]


def width(site: str, hidden: int = WIDTH) -> int:
    return VOCABULARY if site == "logits" else hidden


def batch(kind: str, client: Any, sites: list[str]) -> list[Any]:
    """Return the parameters of 16 requests.

    None of them is ours ("stock", "idle"); one is not steered beside 15 that are ("mixed"), or steered to no effect
    ("one"); every other one is steered to no effect ("half"), or all are ("zero").
    """
    settings = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": -1, "detokenize": False}
    params = []
    for number in range(COUNT):
        if kind in ("stock", "idle") or (kind == "mixed" and number == UNSTEERED):
            params.append(engine.sampling(**settings))
        elif kind == "zero" or (kind == "half" and number % 2 == 0) or (kind == "one" and number == UNSTEERED):
            which = {"zero": number, "half": number // 2, "one": 1}[kind]
            params.append(client.params(to_no_effect(which, sites), **settings))
        else:
            params.append(client.params(to_some_effect(number, sites), **settings))
    return params


def run(
    model: str, modes: list[str], kinds: list[str], dtype: str, sites: list[str], ranks: int = 1
) -> dict[str, list[str]]:
    """Return digests of tokens and logits: mode/kind -> one per request."""
    found = {}
    for mode in modes:
        steered = kinds != ["stock"]
        llm = engine.start(
            model,
            {"sites": sites, "max_steering": 16, "directions_per_op": 2} if steered else None,
            dtype=dtype,
            enforce_eager=mode == "eager",
            tensor_parallel_size=ranks,
            **RAW,
        )
        client = engine.attached(llm) if steered else None
        for kind in kinds:
            outputs = engine.generate(llm, engine.prompts(COUNT, LENGTH), batch(kind, client, sites))
            assert {len(step) for one in outputs for step in one.outputs[0].logprobs} == {VOCABULARY}
            found[f"{mode}/{kind}"] = [engine.logprobs_digest(one) for one in outputs]
        del llm, client
        engine.stop()
    return found


def check_identity(
    model: str, folder: Path, modes: list[str], dtype: str = "bfloat16", sites: list[str] = SITES, ranks: int = 1
) -> dict[str, list[str]]:
    """Return the digests of the stock engine."""
    # the stock engine does not even load the plugin
    apart = {} if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}
    stock = engine.call(run, model, modes, ["stock"], dtype, sites, ranks, cwd=folder, VLLM_PLUGINS="none", **apart)
    ours = engine.call(run, model, modes, KINDS, dtype, sites, ranks, cwd=folder, **apart)
    for mode in modes:
        wanted = stock[f"{mode}/stock"]
        assert len(set(wanted)) == COUNT
        check_bits({kind: ours[f"{mode}/{kind}"] for kind in KINDS}, wanted, mode)
    return stock


def check_bits(found: dict[str, list[str]], wanted: list[str], mode: str) -> None:
    """Who is not steered, or steered to no effect, has the wanted digest; nobody else has any of them."""
    assert found["idle"] == wanted, mode
    assert found["zero"] == wanted, mode
    same = {"mixed": [UNSTEERED], "one": [UNSTEERED], "half": list(range(0, COUNT, 2))}
    for kind, untouched in same.items():
        assert [found[kind][number] for number in untouched] == [wanted[number] for number in untouched], (mode, kind)
        others = {one for number, one in enumerate(found[kind]) if number not in untouched}
        assert len(others) == COUNT - len(untouched)
        assert not others & set(wanted), (mode, kind)


def not_asked(model: str, modes: list[str]) -> dict[str, Any]:
    """Run engines that load the plugin and were not asked to steer; return digests, and what is not of vLLM in them."""
    found: dict[str, Any] = {"digests": {}, "ours": [], "said": []}
    for mode in modes:
        llm = engine.start(model, dtype="bfloat16", enforce_eager=mode == "eager", **RAW)
        outputs = engine.generate(llm, engine.prompts(COUNT, LENGTH), batch("stock", None, SITES))
        found["digests"][mode] = [engine.logprobs_digest(one) for one in outputs]
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        parts = [core, core.scheduler, worker, worker.model_runner, *worker.model_runner.model.modules()]
        found["ours"] += [str(type(one)) for one in parts if type(one).__module__.startswith("trimtab")]
        found["ours"] += [name for one in parts for name in vars(one) if "trimtab" in name]
        try:
            engine.attached(llm)
        except TrimtabError as error:
            found["said"].append(str(error))
        del llm, core, worker, parts
        engine.stop()
    return found


def test_whom_nothing_steers_gets_the_bits_of_stock_vllm(tmp_path: Path) -> None:
    model, modes = engine.save("qwen3", tmp_path / "model", layers=4, width=WIDTH, head=64), ["eager", "compiled"]
    stock = check_identity(model, tmp_path, modes)
    found = engine.call(not_asked, model, ["compiled"], cwd=tmp_path)
    assert found["digests"] == {"compiled": stock["compiled/stock"]}
    assert found["ours"] == []
    assert len(found["said"]) == 1
    assert all('additional_config={"trimtab": {"sites": [' in said for said in found["said"])


@pytest.mark.full
def test_whom_nothing_steers_gets_the_bits_of_stock_vllm_inside_blocks_and_at_the_end(tmp_path: Path) -> None:
    model = engine.save("qwen3", tmp_path / "model", layers=4, width=WIDTH, head=64)
    check_identity(model, tmp_path, ["eager", "compiled"], sites=INSIDE)


@pytest.mark.full
def test_whom_nothing_steers_gets_the_bits_of_stock_vllm_in_llama(tmp_path: Path) -> None:
    model = engine.save("llama", tmp_path / "model", layers=4, width=WIDTH, head=64)
    check_identity(model, tmp_path, ["eager", "compiled"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "modes", "sites"),
    [
        # the lookup of embeddings is fused with what reads them, in GPT-2 with that of positions too
        ("qwen3", ["eager", "compiled"], BEGINNINGS),
        ("gpt2", ["compiled"], SITES),
        ("gpt2", ["compiled"], BEGINNINGS),
        # norms behind branches are fused with the addition and the next norm, and nothing between is rounded
        ("gemma3", ["eager", "compiled"], SITES),
        ("gemma3", ["compiled"], [*BEGINNINGS, "layers.*.resid_mid", "layers.*.mlp_out"]),
        ("gemma2", ["compiled"], SITES),
        ("olmo2", ["compiled"], SITES),
    ],
    ids=lambda given: "-".join(given).replace("layers.*.", "") if isinstance(given, list) else given,
)
def test_whom_nothing_steers_gets_the_bits_of_stock_vllm_where_it_fuses_what_is_steered(
    family: str, modes: list[str], sites: list[str], tmp_path: Path
) -> None:
    model = engine.save(family, tmp_path / "model", layers=4, width=WIDTH, head=64)
    check_identity(model, tmp_path, modes, sites=sites)


@pytest.mark.full
def test_whom_nothing_steers_gets_the_bits_of_stock_vllm_on_two_ranks_with_taps_at_some_norms(tmp_path: Path) -> None:
    model = engine.save("gemma3", tmp_path / "model", layers=4, width=WIDTH, head=64)
    check_identity(model, tmp_path, ["compiled"], sites=["layers.*.mlp_out"], ranks=2)


def corrections(model: str, modes: list[str]) -> dict[str, Any]:
    """Record states before and after ops of each math dtype along forced tokens, eager and compiled."""
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(4))
    sites, states = ["layers.0.resid_pre", "layers.1.mlp_out", "layers.1.resid_post"], {}
    for mode in modes:
        llm = engine.start(model, {"sites": sites}, dtype="bfloat16", enforce_eager=mode == "eager")
        client = engine.attached(llm)
        for math in MATHS:
            ops = [Add(vectors[0], scale=0.37, math=math), Cap(vectors[1], max=-0.21, math=math)]
            one = Steering({site: ops for site in sites})
            params = client.params(
                one, sites=sites, edit=("before", "after"), forced=list(range(9, 25)), temperature=0, detokenize=False
            )
            engine.generate(llm, engine.prompts(1, LENGTH), params)
            ((report,),) = client.collect([params])
            states[mode, math] = {(str(held.site), held.edit): held.rows for held in report.captured}
        del llm, client
        engine.stop()
    return compared(states, sites, vectors)


def compared(states: Any, sites: list[str], vectors: torch.Tensor) -> dict[str, Any]:
    """Compare the modes where they read the same states, and each with the reference on the states that it read."""
    found: dict[str, Any] = {"read": [], "written": [], "reference": [], "over": [], "moved": [], "apart": []}
    for math in MATHS:
        eager, compiled = states["eager", math], states["compiled", math]
        found["read"].append(torch.equal(eager[sites[0], "before"], compiled[sites[0], "before"]))
        found["written"].append(torch.equal(eager[sites[0], "after"], compiled[sites[0], "after"]))
        ops = [Add(vectors[0], scale=0.37, math=math), Cap(vectors[1], max=-0.21, math=math)]
        for key, rows in eager.items():
            found["apart"].append(float((compiled[key].float() - rows.float()).norm() / rows.float().norm()))
        for held in (eager, compiled):
            for site in sites:
                program = Steering({site: ops}).resolve(num_layers=2, hidden_size=128, sites=[Site.parse(site)])[
                    Site.parse(site)
                ]
                before, after = held[site, "before"], held[site, "after"]
                wide = program.apply(before, positions=torch.arange(len(before)), prompt_length=LENGTH).h
                kind = "over" if site.endswith("resid_post") else "reference"  # over the stream, or a tensor of its own
                found[kind].append(float((wide.float() - after.float()).abs().max() / after.float().abs().max()))
                found["moved"].append(float((before != after).float().mean()))
    written = [states["eager", math][sites[0], "after"] for math in MATHS]
    found["maths differ"] = not torch.equal(written[0], written[1])
    return found


def each_op(model: str, dtype: str) -> list[list[bool]]:
    """Return whether an op read the same and wrote the same eager and compiled, and whether it changed something."""
    site, states = "layers.0.resid_pre", []
    for eager in (True, False):
        settings = {"sites": [site], "directions_per_op": 2, "max_steering": 8}
        llm = engine.start(model, settings, dtype=dtype, enforce_eager=eager)
        client = engine.attached(llm)
        asked = {"forced": list(range(9, 25)), "temperature": 0, "detokenize": False}
        params = [
            client.params(to_some_effect(number, [site], 128), sites=[site], edit=("before", "after"), **asked)
            for number in range(8)
        ]
        engine.generate(llm, engine.prompts(8, LENGTH), params)
        states.append([{held.edit: held.rows for held in one.captured} for (one,) in client.collect(params)])
        del llm, client
        engine.stop()
    return [
        [
            torch.equal(one["before"], other["before"]),
            torch.equal(one["after"], other["after"]),
            bool((one["after"] != one["before"]).any()),
        ]
        for one, other in zip(*states, strict=True)
    ]


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", pytest.param("float16", marks=pytest.mark.full), pytest.param("float32", marks=pytest.mark.full)],
)
def test_every_op_corrects_compiled_as_it_does_eager_to_the_bit(dtype: str, tmp_path: Path) -> None:
    model = engine.save("qwen3", tmp_path / "model", layers=2)
    assert engine.call(each_op, model, dtype, cwd=tmp_path) == [[True] * 3] * 8


def test_a_compiled_engine_corrects_as_an_eager_one_does_to_the_bit(tmp_path: Path) -> None:
    model = engine.save("qwen3", tmp_path / "model", layers=2)
    found = engine.call(corrections, model, ["eager", "compiled"], cwd=tmp_path)
    assert found["read"] == [True] * 3, "embeddings are looked up: both modes read the same states"
    assert found["written"] == [True] * 3
    assert found["maths differ"]
    assert max(found["apart"]) < 0.03, "the stream is followed in both modes, through blocks that nothing steers"
    assert max(found["reference"]) < 2**-8  # half of one rounding to bfloat16 of the largest element
    assert max(found["over"]) < 2**-7  # and of the stream, whose sum with the branch is rounded too
    assert min(found["moved"]) > 0.5


def in_order(model: str, order: list[str]) -> dict[str, list[Any]]:
    """Run compiled engines one after the other on one cache of compiled graphs: "stock", or "steered", asked by the
    environment so that the settings of the engines are equal; "again" is steered beside the engine before it."""
    digests, rows, keys, kept = [], [], [], []
    steering = Steering({SITES[0]: [Add(torch.ones(128), scale=0.5)]})
    for kind, following in zip(order, [*order[1:], ""], strict=True):
        os.environ["TRIMTAB_VLLM"] = "0" if kind == "stock" else "1"
        llm = engine.start(model, enforce_eager=False)
        client = None if kind == "stock" else engine.attached(llm)
        settings = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "logprobs": 8, "detokenize": False}
        params = engine.sampling(**settings) if client is None else client.params(steering, **settings)
        (output,) = engine.generate(llm, engine.prompts(1, LENGTH), params)
        digests.append(engine.logprobs_digest(output))
        rows.append([] if client is None else [op.rows for op in client.collect([params])[0][0].ops])
        keys.append(len(list(Path(os.environ["VLLM_CACHE_ROOT"]).glob("torch_compile_cache/torch_aot_compile/*"))))
        kept = [llm] if following == "again" else []
        del llm, client
        if not kept:
            engine.stop()
    return {"digests": digests, "rows": rows, "keys": keys}


def test_a_compiled_graph_is_never_taken_for_one_with_other_taps(tmp_path: Path) -> None:
    model = engine.save("qwen3", tmp_path / "model", layers=2)
    found = engine.call(in_order, model, ["stock", "steered", "again"], cwd=tmp_path)
    stock, steered, again = found["digests"]
    assert stock != steered == again
    assert found["rows"] == [[], [LENGTH + 3] * 2, [LENGTH + 3] * 2]
    assert found["keys"] == [1, 2, 3], "engines with other taps share a name in the cache of compiled graphs"


@pytest.mark.full
def test_a_compiled_graph_serves_its_own_engine_in_both_orders(tmp_path: Path) -> None:
    model = engine.save("qwen3", tmp_path / "model", layers=2)
    runs = []
    for number, order in enumerate((["stock", "steered", "stock"], ["steered", "stock", "steered"])):
        (tmp_path / str(number)).mkdir()
        runs.append(engine.call(in_order, model, order, cwd=tmp_path / str(number)))
        assert runs[-1]["keys"] == [1, 2, 2]
    (stock, steered, last), other = runs[0]["digests"], runs[1]["digests"]
    assert stock == last == other[1]
    assert other[0] == other[2] == steered != stock


ENGINES: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "a": ({"sites": SITES}, {"layers.1.resid_post": [Add(torch.ones(128), scale=0.5)]}),
    "b": (
        {"sites": ["embed", "layers.*.mlp_out"], "ops_per_site": 3, "max_steering": 4},
        {"layers.0.mlp_out": [Add(torch.ones(128), scale=0.2), Ablate(torch.ones(128), keep=0.0)]},
    ),
}


def side_by_side(model: str, mode: str, order: list[str]) -> dict[str, list[Any]]:
    """Run requests on an engine, on another one in the same process, and on both again: what each of them gave."""
    engines: dict[str, Any] = {}
    found: dict[str, list[Any]] = {name: [] for name in order}
    for name in [*order, *order]:
        settings, ops = ENGINES[name]
        if name not in engines:
            llm = engine.start(model, settings, enforce_eager=mode == "eager", **RAW)
            engines[name] = (llm, engine.attached(llm))
        llm, client = engines[name]
        asked = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": -1, "detokenize": False}
        params = client.params(Steering(ops), **asked)
        outputs = engine.generate(llm, engine.prompts(2, LENGTH), [params, engine.sampling(**asked)])
        ((report,),) = client.collect([params])
        digests = [engine.logprobs_digest(one) for one in outputs]
        found[name].append([*digests, [[op.site, op.op, op.rows] for op in report.ops]])
    return found


@pytest.mark.full
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_engines_of_one_process_do_not_change_each_other(mode: str, tmp_path: Path) -> None:
    model = engine.save("qwen3", tmp_path / "model", layers=2)
    one, other = (engine.call(side_by_side, model, mode, order, cwd=tmp_path) for order in (["a", "b"], ["b", "a"]))
    for name in ENGINES:
        first, again = one[name]
        assert first == again == other[name][0] == other[name][1]
        assert first[0] != first[1]
        assert {rows for *_, rows in first[2]} == {LENGTH + 5}
    assert len(one["b"][0][2]) == 2
