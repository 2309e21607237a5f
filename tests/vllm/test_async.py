"""An engine used from an event loop: requests that run together, each with its own steering; and its end."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from collections.abc import Awaitable
from typing import Any

import psutil
import pytest

import trimtab as tt
from trimtab import testbed
from trimtab.backends import Request, open_backend

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm"), pytest.mark.filterwarnings("ignore")]
TOKENS = 12
SECONDS = 60
"""In which every call of an engine that has died ends, or it hangs."""


def steerings() -> list[tt.Steering | None]:
    person, animal = (tt.load_direction(f"testbed:{name}").vector for name in ("person", "animal"))
    site = "layers.4.resid_post"
    return [tt.Steering({site: tt.Add(person, scale=3.0)}), tt.Steering({site: tt.Cap(animal, max=0.5)}), None]


async def generate(engine: Any, client: Any, spec: tt.Steering | None, prompt: list[int], name: str) -> Any:
    params = await client.params(spec, temperature=0, max_tokens=TOKENS, ignore_eos=True)
    async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
        done = output
    return list(done.outputs[0].token_ids), (await client.collect([params]))[0][0]


async def run(prompts: list[list[int]]) -> tuple[list[Any], dict[str, list[str]]]:
    """Return what an engine made of each prompt, and what its callers were told when it had died."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = {"max_model_len": 128, "enforce_eager": True, "dtype": "float32", "max_num_seqs": 4}
    arguments = AsyncEngineArgs(model=str(testbed.path()), additional_config={"trimtab": {}}, **settings)
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        client = await tt.vllm.attach_async(engine)
        given = list(zip(steerings(), prompts, strict=True))
        made = await asyncio.gather(*(generate(engine, client, *one, f"r{n}") for n, one in enumerate(given)))
        return list(made), await die(engine, client, prompts[0])
    finally:
        engine.shutdown()


async def die(engine: Any, client: Any, prompt: list[int]) -> dict[str, list[str]]:
    """Kill the process of an engine, and return what calls that wait for it and later ones raise."""
    made = await client.params(steerings()[0], max_tokens=TOKENS)
    (core,) = engine.engine_core.resources.engine_manager.processes
    process = psutil.Process(core.pid)
    process.suspend()  # it takes what comes, and does not answer
    generating = asyncio.create_task(generate(engine, client, steerings()[0], prompt, "last"))
    asking = asyncio.create_task(client.stats())
    deadline = time.monotonic() + SECONDS
    while not (engine.output_processor.has_unfinished_requests() and engine.engine_core.utility_results):
        assert time.monotonic() < deadline
        await asyncio.sleep(0)
    process.kill()
    other = tt.Steering({"layers.2.resid_post": tt.Cap(tt.load_direction("testbed:animal").vector, max=0.1)})
    found = {
        "generating": await told(generating),
        "asking": await told(asking),
        "generate": await told(generate(engine, client, steerings()[0], prompt, "later")),
        "stats": await told(client.stats()),
        "collect": await told(client.collect([made])),
        "register": await told(client.register(other)),
    }
    for future in engine.engine_core.utility_results.values():
        future.cancel()  # threads that wait for an answer still would keep the test from its end
    return found


async def told(call: Awaitable[Any]) -> list[str]:
    """Return the kind and the message of what a call raises."""
    try:
        await asyncio.wait_for(call, SECONDS)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    reference = open_backend("hf", "testbed")
    return [list(reference.encode(text).ids) for text in testbed.prompts(3, seed=5)]


@pytest.fixture(scope="module")
def found(prompts: list[list[int]]) -> tuple[list[Any], dict[str, list[str]]]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        made = asyncio.run(run(prompts))
    gc.collect()  # the errors keep the engine
    return made


def test_requests_of_an_event_loop_are_steered_each_on_its_own(prompts: list[list[int]], found: Any) -> None:
    requests = [
        Request(prompt=tuple(ids), id=str(number), steering=spec, max_new_tokens=TOKENS, ignore_eos=True)
        for number, (ids, spec) in enumerate(zip(prompts, steerings(), strict=True))
    ]
    expected = open_backend("hf", "testbed").generate(requests)
    for (tokens, report), one, spec in zip(found[0], expected, steerings(), strict=True):
        assert tokens == list(one.token_ids)
        assert report.digest == (None if spec is None else spec.digest)
        assert [op.rows for op in report.ops] == ([] if spec is None else [one.rows])


def test_calls_of_an_engine_that_is_killed_end_with_one_clear_error_each(found: Any) -> None:
    ended = found[1]
    for name in ("generating", "generate"):
        assert ended[name][0] == "EngineDeadError"  # vLLM's own
    for name in ("asking", "stats", "collect", "register"):
        kind, message = ended[name]
        assert kind == "BackendError"
        assert "the engine has died" in message
        assert "start it again" in message
        assert "\n" not in message
