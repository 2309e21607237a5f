"""An engine used from an event loop: requests that run together, each with its own steering."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

import trimtab as tt
from trimtab import testbed
from trimtab.backends import Request, open_backend

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm"), pytest.mark.filterwarnings("ignore")]
TOKENS = 12


def steerings() -> list[tt.Steering | None]:
    person, animal = (tt.load_direction(f"testbed:{name}").vector for name in ("person", "animal"))
    site = "layers.4.resid_post"
    return [tt.Steering({site: tt.Add(person, scale=3.0)}), tt.Steering({site: tt.Cap(animal, max=0.5)}), None]


async def run(prompts: list[list[int]]) -> list[tuple[list[int], Any]]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = {"max_model_len": 128, "enforce_eager": True, "dtype": "float32", "max_num_seqs": 4}
    arguments = AsyncEngineArgs(model=str(testbed.path()), additional_config={"trimtab": {}}, **settings)
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        client = await tt.vllm.attach_async(engine)

        async def one(number: int) -> tuple[list[int], Any]:
            params = await client.params(steerings()[number], temperature=0, max_tokens=TOKENS, ignore_eos=True)
            async for output in engine.generate({"prompt_token_ids": prompts[number]}, params, f"r{number}"):
                done = output
            return list(done.outputs[0].token_ids), (await client.collect([params]))[0][0]

        return list(await asyncio.gather(*(one(number) for number in range(len(prompts)))))
    finally:
        engine.shutdown()


def test_requests_of_an_event_loop_are_steered_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    reference = open_backend("hf", "testbed")
    prompts = [list(reference.encode(text).ids) for text in testbed.prompts(3, seed=5)]
    requests = [
        Request(prompt=tuple(ids), id=str(number), steering=spec, max_new_tokens=TOKENS, ignore_eos=True)
        for number, (ids, spec) in enumerate(zip(prompts, steerings(), strict=True))
    ]
    expected = reference.generate(requests)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = asyncio.run(run(prompts))
    for (tokens, report), one, spec in zip(found, expected, steerings(), strict=True):
        assert tokens == list(one.token_ids)
        assert report.digest == (None if spec is None else spec.digest)
        assert [op.rows for op in report.ops] == ([] if spec is None else [one.rows])
