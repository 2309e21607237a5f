"""Who is not steered is not changed: bit for bit stock vLLM; and compiled corrections are those of eager ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm import _engine as engine
from trimtab.sites import Site
from trimtab.steering import Ablate, Add, Cap, Steering

pytestmark = engine.MARKS
COUNT, LENGTH, TOKENS, TOP, WIDTH = 16, 12, 24, 50, 512
UNSTEERED = 5
SITES = ["layers.*.resid_post"]
MATHS = ("float32", "bfloat16", "float16")


def batch(kind: str, client: Any) -> list[Any]:
    """Return the parameters of 16 requests: nobody steered, one of them not, or steered to no effect."""
    settings = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": TOP, "detokenize": False}
    made = torch.Generator().manual_seed(1)
    params = []
    for number in range(COUNT):
        vector = torch.randn(WIDTH, generator=made)
        nothing = [Add(vector, scale=0.0), Cap(vector, max=1e6), Ablate(vector, keep=1.0)][number % 3]
        op = Add(vector, scale=0.3) if kind == "mixed" else nothing
        idle = kind in ("stock", "idle") or (kind == "mixed" and number == UNSTEERED)
        plain = engine.sampling(**settings)
        params.append(plain if idle else client.params(Steering({SITES[0]: [op]}), **settings))
    return params


def run(model: str, modes: list[str], kinds: list[str], dtype: str = "bfloat16") -> dict[str, list[str]]:
    """Return digests of tokens and logprobs: mode/kind -> one per request."""
    found = {}
    for mode in modes:
        steered = kinds != ["stock"]
        llm = engine.start(
            model,
            {"sites": SITES, "max_steering": 16} if steered else None,
            dtype=dtype,
            enforce_eager=mode == "eager",
        )
        client = engine.attached(llm) if steered else None
        for kind in kinds:
            outputs = engine.generate(llm, engine.prompts(COUNT, LENGTH), batch(kind, client))
            found[f"{mode}/{kind}"] = [engine.logprobs_digest(one) for one in outputs]
        del llm, client
        engine.stop()
    return found


def check_identity(model: str, folder: Path, modes: list[str], dtype: str = "bfloat16") -> None:
    # the stock engine does not even load the plugin
    stock = engine.call(run, model, modes, ["stock"], dtype, cwd=folder, VLLM_PLUGINS="none")
    ours = engine.call(run, model, modes, ["idle", "mixed", "zero"], dtype, cwd=folder)
    for mode in modes:
        wanted = stock[f"{mode}/stock"]
        assert len(set(wanted)) == COUNT
        assert ours[f"{mode}/idle"] == wanted
        assert ours[f"{mode}/zero"] == wanted
        mixed = ours[f"{mode}/mixed"]
        assert mixed[UNSTEERED] == wanted[UNSTEERED]
        assert not {one for number, one in enumerate(mixed) if number != UNSTEERED} & set(wanted)


def test_whom_nothing_steers_gets_the_bits_of_stock_vllm(tmp_path: Path) -> None:
    check_identity(
        engine.save("qwen3", tmp_path / "model", layers=4, width=WIDTH, head=64), tmp_path, ["eager", "compiled"]
    )


@pytest.mark.full
def test_whom_nothing_steers_gets_the_bits_of_stock_vllm_in_llama(tmp_path: Path) -> None:
    model = engine.save("llama", tmp_path / "model", layers=4, width=WIDTH, head=64)
    check_identity(model, tmp_path, ["eager", "compiled"])


@pytest.mark.full
def test_norms_behind_branches_are_rounded_to_16_bits_once_more_when_compiled(tmp_path: Path) -> None:
    # Stock vLLM fuses that norm, the addition and the next norm, and keeps what is between them in float32; a state
    # that can be steered and recorded is a tensor of the model's dtype, as it is in an eager engine.
    model = engine.save("gemma3", tmp_path / "model", layers=4, width=WIDTH, head=64)
    check_identity(model, tmp_path, ["eager"])
    check_identity(model, tmp_path, ["compiled"], "float32")
    found = engine.call(run, model, ["compiled"], ["idle", "mixed", "zero"], cwd=tmp_path)
    idle, mixed = found["compiled/idle"], found["compiled/mixed"]
    assert found["compiled/zero"] == idle
    assert mixed[UNSTEERED] == idle[UNSTEERED]
    assert not {one for number, one in enumerate(mixed) if number != UNSTEERED} & set(idle)


def corrections(model: str, modes: list[str]) -> dict[str, Any]:
    """Record states before and after ops of each math dtype along forced tokens, eager and compiled."""
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(4))
    sites, states = ["layers.0.resid_pre", "layers.1.mlp_out"], {}
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
    found: dict[str, Any] = {"read": [], "written": [], "reference": [], "moved": []}
    for math in MATHS:
        eager, compiled = states["eager", math], states["compiled", math]
        found["read"].append(torch.equal(eager[sites[0], "before"], compiled[sites[0], "before"]))
        found["written"].append(torch.equal(eager[sites[0], "after"], compiled[sites[0], "after"]))
        ops = [Add(vectors[0], scale=0.37, math=math), Cap(vectors[1], max=-0.21, math=math)]
        for held in (eager, compiled):
            for site in sites:
                program = Steering({site: ops}).resolve(num_layers=2, hidden_size=128, sites=[Site.parse(site)])[
                    Site.parse(site)
                ]
                before, after = held[site, "before"], held[site, "after"]
                wide = program.apply(before, positions=torch.arange(len(before)), prompt_length=LENGTH).h
                found["reference"].append(float((wide.float() - after.float()).abs().max() / after.float().abs().max()))
                found["moved"].append(float((before != after).float().mean()))
    written = [states["eager", math][sites[0], "after"] for math in MATHS]
    found["maths differ"] = not torch.equal(written[0], written[1])
    return found


def test_a_compiled_engine_corrects_as_an_eager_one_does_to_the_bit(tmp_path: Path) -> None:
    model = engine.save("qwen3", tmp_path / "model", layers=2)
    found = engine.call(corrections, model, ["eager", "compiled"], cwd=tmp_path)
    assert found["read"] == [True] * 3, "embeddings are looked up: both modes read the same states"
    assert found["written"] == [True] * 3
    assert found["maths differ"]
    assert max(found["reference"]) < 2**-8  # half of one rounding to bfloat16 of the largest element
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
