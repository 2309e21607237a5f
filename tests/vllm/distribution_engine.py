"""Run in a process of its own: one engine, of one or of several workers, runs the requests of a plan.

The plan is a JSON document: `name`, `kind` ("llm", "async" or "ray"), `model`, `settings` (ours), `engine` (vLLM's),
`refused` (steering files that may not be taken), `requests`, and `dies` (whether a worker is killed in the end). What
came of it is NAME.json and NAME.safetensors beside the plan.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch
from vllm import LLM

from trimtab.backends.vllm import Client, Report, attach
from trimtab.backends.vllm.asynchronous import Workers
from trimtab.errors import BackendError, TrimtabError
from trimtab.steering import Add, Steering

COMMON = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 32,  # prompts come in parts; the longest do not fit
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "seed": 0,
}
SECONDS = 120
"""In which every call of an engine that has died ends, or it hangs."""


def refusals(client: Client, files: list[str]) -> list[str]:
    said = []
    for file in files:
        try:
            client.register(Steering.load(file))
        except TrimtabError as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("")
    return said


def params(client: Client, requests: list[dict[str, Any]]) -> list[Any]:
    return [
        client.params(
            Steering.load(asked["steering"]) if asked["steering"] else None,
            sites=asked["sites"],
            edit=asked["edit"],
            positions=asked["positions"],
            dose=asked["dose"],
            forced=asked["forced"],
            n=asked["n"],
            temperature=0.0 if asked["n"] == 1 else 0.7,
            max_tokens=asked["tokens"],
            ignore_eos=True,
            detokenize=False,
        )
        for asked in requests
    ]


def collect(client: Client, made: list[Any]) -> tuple[list[list[Report]], str]:
    """Bring home what all requests left; one that never was comes first, and must cost the others nothing."""
    unknown = client.params(None, sites=["final_norm"])
    try:
        client.collect([made[0], unknown, made[1]])
    except BackendError as error:
        return client.collect(made), str(error)
    return client.collect(made), ""


def run_llm(one: dict[str, Any]) -> dict[str, Any]:
    llm = LLM(one["model"], additional_config={"trimtab": one["settings"]}, **(COMMON | one["engine"]))
    if one["engine"].get("pipeline_parallel_size", 1) > 1:
        # later stages have nowhere to receive before a first pass, which vLLM leaves out for eager engines on the CPU
        llm.collective_rpc("execute_dummy_batch")
    client = attach(llm)
    said = refusals(client, one["refused"])
    made = params(client, one["requests"])
    preempted = preemptions(llm)
    outputs = llm.generate([{"prompt_token_ids": asked["prompt"]} for asked in one["requests"]], made, use_tqdm=False)
    reports, unknown = collect(client, made)
    found = {"said": said, "unknown": unknown, "outputs": outputs, "reports": reports, "stats": client.stats()}
    found["preempted"] = len(preempted)
    found["died"] = die(llm, client, one["requests"]) if one["dies"] else {}
    llm.llm_engine.engine_core.shutdown()
    return found


def die(llm: Any, client: Client, requests: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Kill a worker under a steered generation, and return what that call and later ones raise."""
    steered = next(asked for asked in requests if asked["steering"])
    other = Steering({"layers.2.resid_post": [Add(torch.ones(128))]})
    made = client.params(Steering.load(steered["steering"]), max_tokens=100, ignore_eos=True, detokenize=False)

    def generate() -> Any:
        return llm.generate([{"prompt_token_ids": steered["prompt"]}], made, use_tqdm=False)

    worker = psutil.Process(llm.llm_engine.engine_core.engine_core.model_executor.workers[1].proc.pid)
    worker.suspend()  # the generation cannot end before the worker is killed
    pool = ThreadPoolExecutor(1)
    running = pool.submit(generate)
    while not llm.llm_engine.has_unfinished_requests():
        assert not running.done()
    worker.kill()
    calls = {"collect": lambda: client.collect([made]), "register": lambda: client.register(other)}
    ended = {"generating": running} | {name: pool.submit(call) for name, call in calls.items()}
    found = {name: one.exception(SECONDS) for name, one in ended.items()}
    return {name: [type(error).__name__, str(error)] for name, error in found.items()}


def preemptions(llm: Any) -> list[str]:
    """Return a list that will hold the name of each request when the engine's scheduler preempts it."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    found, stock = list[str](), scheduler._preempt_request

    def noted(request: Any, *more: Any, **named: Any) -> Any:
        found.append(request.request_id)
        return stock(request, *more, **named)

    scheduler._preempt_request = noted
    return found


async def run_async(one: dict[str, Any]) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=one["model"], additional_config={"trimtab": one["settings"]}, **(COMMON | one["engine"]))
    )
    client = await Workers(engine).attach()
    said = await asyncio.to_thread(refusals, client, one["refused"])
    made = await asyncio.to_thread(params, client, one["requests"])
    for each in made:
        each.output_kind = RequestOutputKind.FINAL_ONLY

    async def generate(number: int) -> Any:
        prompt = {"prompt_token_ids": one["requests"][number]["prompt"]}
        return [out async for out in engine.generate(prompt, made[number], request_id=str(number))][-1]

    outputs = await asyncio.gather(*(generate(number) for number in range(len(made))))
    reports, unknown = await asyncio.to_thread(collect, client, made)
    stats = await asyncio.to_thread(client.stats)
    engine.shutdown()
    return {
        "said": said, "unknown": unknown, "outputs": outputs, "reports": reports, "stats": stats, "preempted": None
    }  # fmt: skip


def run_ray(one: dict[str, Any]) -> dict[str, Any]:
    with ray_cluster(Path(one["folder"])):
        return run_llm(one)


def allow_ray() -> None:
    """Have vLLM's CPU platform name a resource that Ray schedules by, which its GPU platforms do."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


@contextmanager
def ray_cluster(folder: Path) -> Iterator[None]:
    """Two nodes of Ray on this machine, each with the room of one worker."""
    import ray
    from ray.cluster_utils import Cluster

    allow_ray()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2, num_gpus=1)
        here = str(Path(__file__).parent)
        ray.init(
            address=cluster.address,
            runtime_env={
                "worker_process_setup_hook": "distribution_engine.allow_ray",
                "env_vars": {"PYTHONPATH": here},
            },
        )
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def write(plan: Path, one: dict[str, Any], found: dict[str, Any]) -> None:
    rows: dict[str, torch.Tensor] = {}
    requests = []
    for number, (output, reports) in enumerate(zip(found["outputs"], found["reports"], strict=True)):
        children = []
        for child, report in enumerate(reports):
            captured = []
            for held in report.captured:
                key = f"{number}/{child}/{held.site}/{held.edit}"
                rows[key] = held.rows.contiguous()
                captured.append([key, held.positions, held.pp_rank])
            for (site, op), (positions, values) in report.full.items():
                key = f"{number}/{child}/{site}/full{op}"
                rows[key] = values.contiguous()
                captured.append([key, positions, -1])
            children.append(
                {
                    "digest": report.digest,
                    "rows": report.rows,
                    "cached": report.cached,
                    "ops": [[op.site, op.op, op.rows, op.clamped, op.selected] for op in report.ops],
                    "captured": captured,
                }
            )
        requests.append({"tokens": [list(made.token_ids) for made in output.outputs], "children": children})
    document = {name: found.get(name) for name in ("said", "unknown", "stats", "preempted", "died")}
    document["requests"] = requests
    safetensors.torch.save_file(rows, plan.with_name(f"{one['name']}.safetensors"))
    plan.with_name(f"{one['name']}.json").write_text(json.dumps(document))


def main() -> None:
    plan = Path(sys.argv[1])
    one = json.loads(plan.read_text())
    run = {"llm": run_llm, "ray": run_ray, "async": lambda given: asyncio.run(run_async(given))}[one["kind"]]
    write(plan, one, run(one))


if __name__ == "__main__":
    main()
