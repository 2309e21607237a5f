"""Bad input: one clear line each, and the engine keeps serving the others.

Which test holds which known failure of systems that steer (stated as what must not happen):

    rows lost after the last full buffer of a capture                    test_rows (33 generated rows), test_captured
    rows of a pass read before the copy is done                          a copy to the host within the pass: test_rows
    lengths guessed: cached prefixes, chunks, resumed requests           test_rows, test_step, test_cache
    one request's vector at another's rows                               test_rows, test_many, test_step
    cached keys and values of one steering given to another              test_cache, test_cache_keys
    batches with padding                                                 test_step (rows beyond the batch), test_bank
    a layer that runs before the worker is ready, or of a draft          engines start in every module; test_taps
    an assumed order of cached and new requests                          test_step (shuffled), test_rows (mixed)
    unsteered requests changed, small vectors lost in 16 bits            test_identity, test_ops (dtypes)
    unit vectors not checked, min above max, no-effect defaults          tests/unit/steering
    unknown ids end a clean-up, steerings kept for good                  test_state, test_many, here
    shared memory and results left behind                                test_many (nothing is shared), test_state
    steering only without graphs; silent no-ops                          test_identity (compiled), test_conformance
    one call per request before it can run                               test_state (sent once)
    global state, patches that stay                                      test_identity (two engines in one process)
    half of a fused residual; off by one layer; off without a capture    test_families, test_taps; test_rows
    positions counted within a chunk or a step, not in the sequence      test_rows, test_step
    a tuple changed as if it were a tensor; aliases of the stream        test_taps, test_bank
    dots in 16 bits                                                      test_identity (math), test_bank
    vectors copied at every call                                         test_state (sent once), test_bank
    prompt + generated - 1 rows                                          test_rows
    caps taken for floors                                                test_bank, test_ops
    pickles of untrusted vectors                                         test_state (bytes that are no steering), here
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.vllm import _engine as engine
from trimtab.backends import Request, open_backend
from trimtab.backends.vllm import attach
from trimtab.errors import BackendError, InputError, PositionError, SiteError, TrimtabError
from trimtab.steering import Add, Edit, Patch, Steering

pytestmark = engine.MARKS
WIDTH, SITE = 128, "layers.1.resid_post"
V = torch.ones(WIDTH)


def said(action: Any) -> list[str]:
    """Return the kind and the message of what an action raises."""
    try:
        action()
    except TrimtabError as error:
        return [type(error).__name__, str(error)]
    except Exception as error:
        return ["not ours", f"{type(error).__name__}: {error}"]
    return ["nothing", ""]


def serving(model: str) -> dict[str, Any]:
    """Ask one engine for what it cannot do, and see that it goes on."""
    settings = {"sites": ["layers.*.resid_post"], "max_steering": 1, "ops_per_site": 1, "keys_per_steering": 1}
    llm = engine.start(
        model, settings | {"when_full": "refuse", "max_payload_bytes": 1 << 16}, enable_prefix_caching=True
    )
    client = engine.attached(llm)
    wrong = {
        "layer": Steering({"layers.9.resid_post": [Add(V)]}),
        "width": Steering({SITE: [Add(torch.ones(WIDTH + 1))]}),
        "site": Steering({"layers.1.mlp_out": [Add(V)]}),
        "ops": Steering({SITE: [Add(V), Add(-V)]}),
        "keys": Steering({SITE: [Add(V)]}, positions="0:1")
        + Steering({"layers.0.resid_post": [Add(V)]}, positions="1:2"),
        "payload": Steering({SITE: [Patch(torch.ones(200, WIDTH))]}),
        "code": Steering({SITE: [Edit(lambda h: h)]}),
    }
    settings = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "detokenize": False}
    good = Steering({SITE: [Add(V, scale=0.1)]})
    found: dict[str, Any] = {name: said(lambda one=one: client.params(one, **settings)) for name, one in wrong.items()}
    found["positions"] = said(
        lambda: client.params(good, sites=["layers.0.resid_post"], positions="tokens{", **settings)
    )
    found["recorded"] = said(lambda: client.params(good, sites=["layers.0.mlp_out"], **settings))
    found["foreign"] = said(lambda: client.collect([engine.sampling(**settings)]))
    found["twice"] = said(lambda: client.collect([client.params(good, **settings)]))
    found["verb"] = said(lambda: client._ask("no such verb"))
    found["bytes"] = said(lambda: client._ask("register", b"\x80\x04 this is a pickle"))
    handmade = {
        "version": {"v": 1, "id": "a"},
        "text": "name:0.5",
        "digest": {"v": 2, "id": "b", "steering": {"digest": "f" * 64, "ops": "[]"}},
        "ops": {"v": 2, "id": "c", "steering": {"digest": good.digest}},
        "capture": {"v": 2, "id": "d", "capture": {"sites": ["nowhere"], "edit": ["after"], "positions": "all"}},
        "selection": {"v": 2, "id": "e", "capture": {"sites": [SITE], "edit": ["after"], "positions": "tokens{"}},
        "forced": {"v": 2, "id": "f", "forced": [5, 10**9]},
        "edit": {"v": 2, "id": "g", "capture": {"sites": [SITE], "edit": "after", "positions": "all"}},
        "label": {"v": 2, "id": ["h"]},
    }
    prompts = engine.prompts(len(handmade) + 2, 9)
    plain = engine.tokens(engine.generate(llm, prompts[:1], engine.sampling(**settings)))[0]
    params = [engine.sampling(**settings, extra_args={"trimtab": one}) for one in handmade.values()]
    ours = client.params(good, **settings)
    outputs = engine.generate(
        llm, [prompts[0], *prompts[1:-1], prompts[-1]], [engine.sampling(**settings), *params, ours]
    )
    ends = [output.outputs[0].finish_reason for output in outputs]
    found["handmade"] = dict(zip(handmade, ends[1:-1], strict=True))
    found["beside"] = [list(outputs[0].outputs[0].token_ids) == plain, ends[0], ends[-1]]
    ((report,),) = client.collect([ours])
    found["dose"] = [op.rows for op in report.ops]
    late = client.params(good, **settings)
    llm.llm_engine.add_request("late", prompts[0], late)
    llm.llm_engine.step()
    found["early"] = said(lambda: client.collect([late]))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    ((report,),) = client.collect([late])
    found["late"] = [op.rows for op in report.ops]
    two = [client.params(Steering({SITE: [Add(V, scale=k)]}), **settings) for k in (0.1, 0.2)]
    outputs = engine.generate(llm, [prompts[0]] * 2, two)
    found["full"] = [output.outputs[0].finish_reason for output in outputs]
    found["full why"] = said(lambda: client.collect(two))
    client.collect(two[:1])
    outside = {
        "steered": client.params(Steering({SITE: [Add(V)]}, positions="-40:"), **settings),
        "recorded rows": client.params(good, sites=[SITE], positions="-40:", **settings),
    }
    for name, one in outside.items():
        both = engine.generate(llm, prompts[:2], [engine.sampling(**settings), one])
        ends = [output.outputs[0].finish_reason for output in both]
        found[name] = [said(lambda one=one: client.collect([one])), ends, engine.tokens(both)[0] == plain]
    found["forced"] = said(lambda: client.params(None, forced=[5, 10**9]))
    bad = client.params(Steering({SITE: [Patch(torch.ones(2, WIDTH))]}), **settings)  # two rows for nine
    both = engine.generate(llm, prompts[:2], [engine.sampling(**settings), bad])
    ((report,),) = client.collect([bad])
    found["patch"] = [report.problems, engine.tokens(both)[0] == plain, [op.rows for op in report.ops]]
    return found


def left_out(model: str) -> list[str]:
    """Attach to an engine that has loaded the plugins of VLLM_PLUGINS, which does not name ours."""
    from vllm import plugins

    os.environ["VLLM_PLUGINS"] = "another"
    llm = engine.start(model, {"sites": ["layers.*.resid_post"]})
    found = said(lambda: engine.attached(llm))
    del llm
    engine.stop()
    del os.environ["VLLM_PLUGINS"]
    plugins.plugins_loaded = False  # so that the next engine of this process loads ours
    return found


def starting(models: dict[str, str]) -> dict[str, Any]:
    """Start engines that cannot steer."""
    import vllm

    found = {"left out": left_out(models["qwen3"])}

    def begin(name: str, model: str, settings: Any = None, **more: Any) -> None:
        found[name] = said(lambda: engine.start(model, settings or {"sites": ["layers.*.resid_post"]}, **more))
        engine.stop()

    begin("family", models["gptj"])
    begin("site", models["qwen3"], {"sites": ["layers.7.resid_post"]})
    begin("setting", models["qwen3"], {"sites": ["layers.*.resid_post"], "max_slots": 4})
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    begin("speculative", models["qwen3"], speculative_config=ngram)
    vllm.__version__ = "0.33.1"
    begin("version", models["qwen3"])
    return found


def one_line(found: list[str], kind: str, *words: str) -> None:
    assert found[0] == kind, found
    assert "\n" not in found[1]
    for word in words:
        assert word in found[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return engine.save("qwen3", tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def found(model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return engine.call(serving, model, cwd=tmp_path_factory.mktemp("serving"))


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("layer", "SiteError", ("layers.9",)),
        ("width", "VectorError", ("129", "128")),
        ("site", "SiteError", ("layers.1.mlp_out", "started with sites")),
        ("ops", "SteeringError", ("2 ops", "holds 1", "ops_per_site=2")),
        ("keys", "SteeringError", ("2 different pairs", "keys_per_steering")),
        ("payload", "SteeringError", ("65536", "max_payload_bytes")),
        ("code", "SteeringError", ("Edit",)),
        ("positions", "PositionError", ("tokens{",)),
        ("recorded", "SiteError", ("layers.0.mlp_out", "capture_sites")),
        ("foreign", "InputError", ("params(...)",)),
        ("twice", "BackendError", ("is not kept in any engine",)),
        ("bytes", "SteeringError", ("payload",)),
        ("forced", "InputError", ("1000000000", "ids from 0 to")),
    ],
)
def test_what_an_engine_cannot_do_is_refused_in_one_line(
    name: str, kind: str, words: tuple[str, ...], found: Any
) -> None:
    one_line(found[name], kind, *words)


def test_an_unknown_verb_is_refused_and_the_engine_goes_on(found: Any) -> None:
    assert found["verb"][0] == "BackendError"


def test_requests_that_another_hand_made_end_alone(found: Any) -> None:
    assert found["handmade"] == {
        "version": "error",
        "text": "error",
        "digest": "error",
        "ops": "error",
        "capture": "error",
        "selection": "error",
        "forced": "error",
        "edit": "error",
        "label": "error",
    }
    assert found["beside"] == [True, "length", "length"]
    assert found["dose"] == [9 + 3]


def test_a_request_that_runs_is_not_collected(found: Any) -> None:
    one_line(found["early"], "BackendError", "late", "still running")
    assert found["late"] == found["dose"]


def test_a_steering_beyond_the_slots_is_refused_where_that_was_asked_for(found: Any) -> None:
    assert found["full"] == ["length", "error"]
    one_line(found["full why"], "BackendError", "request 2 of 2 was refused", "hold all 1 slots", "max_steering")


@pytest.mark.parametrize("name", ["steered", "recorded rows"])
def test_a_selection_before_the_prompt_is_refused_alone_and_says_why(name: str, found: Any) -> None:
    why, ends, beside = found[name]
    one_line(why, "PositionError", "the request was refused", "'-40:'", "which has 9 tokens")
    assert ends == ["length", "error"]
    assert beside


def test_an_op_that_cannot_act_says_so_and_the_engine_goes_on(found: Any) -> None:
    (why, what), beside, rows = found["patch"]
    assert why == "Patch: no source row for position 2; the source has 2 positions from 0 to 1"
    assert what == "0:Patch at layers.1.resid_post acted on 0 rows of the 12 that its positions select"
    assert beside
    assert rows == [0]


def test_engines_that_cannot_steer_do_not_start(model: str, tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(n_embd=WIDTH, n_head=4, n_layer=1, rotary_dim=32, vocab_size=128, n_positions=256)
    config.architectures = ["GPTJForCausalLM"]
    other = GPTJForCausalLM(config)
    other.save_pretrained(tmp_path / "gptj")
    found = engine.call(starting, {"qwen3": model, "gptj": str(tmp_path / "gptj")}, cwd=tmp_path)
    one_line(found["left out"], "BackendError", "is trimtab installed where its workers run", "VLLM_PLUGINS")
    one_line(found["family"], "BackendError", "GPTJForCausalLM", "Qwen3ForCausalLM", "known")
    one_line(found["site"], "SiteError", "layers.7")
    one_line(found["setting"], "InputError", "max_slots", "max_steering")
    one_line(found["speculative"], "BackendError", "speculative_config")
    one_line(found["version"], "PrerequisiteError", "0.33.1", "0.32")


def test_attaching_to_an_engine_that_was_not_asked_says_how_to_ask() -> None:
    stock = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(additional_config={})))
    with pytest.raises(BackendError, match=r"additional_config=.*TRIMTAB_VLLM=1"):
        attach(stock)
    with pytest.raises(InputError, match=r"takes a vllm\.LLM"):
        attach(object())


def test_a_worker_that_dies_is_one_error_and_bad_positions_another(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (engine.SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with pytest.raises(SiteError, match=r"layer 7 is outside this model, which has layers 0 to 1$"):
        open_backend("vllm", model, dtype="float32", sites=["layers.7.resid_post"], engine={"enforce_eager": True})
    before = set(psutil.Process().children(recursive=True))
    backend = open_backend("vllm", model, dtype="float32", engine={"enforce_eager": True, "max_model_len": 256})
    one = Request(prompt=(5, 6, 7), steering=Steering({SITE: [Add(V)]}, positions="-9:"), max_new_tokens=4)
    with pytest.raises(PositionError, match="before the prompt"):
        backend.generate([one])
    good = Request(prompt=(5, 6, 7), steering=Steering({SITE: [Add(V)]}), max_new_tokens=4, ignore_eos=True)
    assert len(backend.generate([good])[0].token_ids) == 4
    (core,) = [
        child
        for child in set(psutil.Process().children(recursive=True)) - before
        if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline())
    ]
    core.suspend()  # it takes the request and does not answer
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(backend.generate, [good])
        while not backend._llm.llm_engine.has_unfinished_requests():
            assert not running.done()
        core.kill()
        stopped = running.exception(60)
    assert isinstance(stopped, BackendError)
    one_line(["", str(stopped)], "", "the engine stopped")
    with pytest.raises(BackendError, match=r"the engine stopped|did not answer"):
        backend.generate([good])
    backend.close()
