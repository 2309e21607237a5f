"""What every process of `test_sae_parallel.py` runs: trainings of several kinds, and looks at what a process holds."""

from __future__ import annotations

import gc
import json
import os
import sys
import unittest.mock
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from trimtab.sae import fast
from trimtab.sae.config import OptimConfig, SAEConfig
from trimtab.sae.data import Stream, StreamConfig, SyntheticSource
from trimtab.sae.learner import Learner
from trimtab.sae.parallel import Parallel
from trimtab.sae.precision import Precision
from trimtab.sae.synthetic import SparseDictionary
from trimtab.sae.train import Plan, TrainConfig, train_stream

STEPS = 20
KINDS: dict[str, dict[str, Any]] = {
    "jumprelu": {"pre_act_coefficient": 1e-3},
    "jumprelu-step": {},
    "topk": {"k": 4, "dead_tokens": 300},
    "batchtopk": {"k": 4, "dead_tokens": 300},
    "gated": {},
    "standard": {},
    "matryoshka-batchtopk": {"k": 4, "widths": (10, 50)},
    "matryoshka-jumprelu": {"penalty": "tanh"},
}


def plan(kind: str, lower_dtype: str = "fp32") -> Plan:
    architecture = kind.removesuffix("-step")
    config = SAEConfig(architecture=architecture, d_in=16, d_sae=50, **KINDS[kind])  # type: ignore[arg-type]
    optim = OptimConfig(lr=3e-3, warmup=4, clip=0.5, beta1=0.9 if kind == "gated" else 0.0)
    optim = replace(optim, target_l0=5.0) if kind == "jumprelu" else optim
    precision, scaled = Precision.parse("fp32", lower_dtype), lower_dtype == "fp16"
    return Plan(name="sae", config=config, optim=optim, precision=precision, adam_trick=scaled, seed=7)


def train(kind: str, out: Path, latents: int, *, lower_dtype: str = "fp32", **given: Any) -> Any:
    source = SyntheticSource(SparseDictionary(32, 16, mean_active=3), rows=5000, chunk_rows=100)
    stream = Stream(source, StreamConfig(batch_size=64, buffer_rows=256, held_out=128, seed=3))
    settings = {"steps": STEPS, "eval_every": 10, "save_every": 10, "shard_latents": latents, **given}
    return train_stream(plan(kind, lower_dtype), stream, TrainConfig(**settings), out=out)


def held(parallel: Parallel) -> dict[str, int]:
    """Return the bytes of a wide learner after some steps: masters and moments, and of every tensor that is alive."""
    gc.collect()
    before = {one.untyped_storage().data_ptr() for one in _tensors()}
    learner = Learner(
        SAEConfig(d_in=64, d_sae=2048),
        optim=OptimConfig(beta1=0.9),
        precision=Precision(torch.float32, torch.bfloat16),
        split=parallel.split,
        shared=parallel.shared,
    )
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        parallel.step(learner, x, None)
    learner.reconstruct(x)
    parallel.state(learner)
    gc.collect()
    alive = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _tensors()}
    kept = [one for name, one in learner.state().items() if name.partition(".")[0] in ("parameter", "first", "second")]
    return {
        "kept": sum(one.numel() * one.element_size() for one in kept),
        "alive": sum(size for place, size in alive.items() if place not in before),
    }


def _tensors() -> list[torch.Tensor]:
    return [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]


def gradients(parallel: Parallel) -> dict[str, bool]:
    """Return, by parameter, whether the gradients of this process's part are the mean of all parts', to the bit."""
    precision = Precision(torch.float32, torch.bfloat16)
    config = SAEConfig(d_in=16, d_sae=50)
    learner = Learner(config, precision=precision, split=parallel.split, shared=parallel.shared, seed=1)
    alone = Learner(config, precision=precision, seed=1)
    alone.fast = False
    x = torch.randn(parallel.tokens, 32, 16, generator=torch.Generator().manual_seed(0))
    rank = int(os.environ["RANK"])
    found = learner.compute(x[rank]).gradients
    each = [alone.compute(one).gradients for one in x]
    same = {}
    for name, one in found.items():
        mean = torch.stack([other[name] for other in each]).sum(0) / len(each)
        part = mean.chunk(parallel.tokens)[rank]
        same[name] = one.dtype == torch.float32 and one.equal(part)
    narrow = found["W_enc"].bfloat16().float()
    return same | {"reduced wide": not narrow.equal(found["W_enc"])}


def gathered(parallel: Parallel) -> dict[str, str]:
    """Return the dtypes that parameters have for a batch, by name."""
    precision = Precision(torch.float32, torch.bfloat16)
    learner = Learner(SAEConfig(d_in=16, d_sae=50), precision=precision, split=parallel.split, shared=parallel.shared)
    assert learner.shards is not None
    with learner.shards.gathered() as weights:
        return {name: f"{tuple(one.shape)} {one.dtype}" for name, one in weights.parameters.items()}


def fast_paths(parallel: Parallel) -> dict[str, int]:
    """Return, by kind, how many of two steps of this process take the compiled passes of a CPU."""
    taken = {}
    for kind, dead in (("jumprelu", 10**7), ("topk", 10**7), ("topk", 1), ("batchtopk", 10**7)):
        k = None if kind == "jumprelu" else 4
        config = SAEConfig(architecture=kind, d_in=16, d_sae=50, k=k, dead_tokens=dead)  # type: ignore[arg-type]
        learner = Learner(config, split=parallel.split)
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
        with unittest.mock.patch.object(fast, "differentiate", wraps=fast.differentiate) as passes:
            parallel.step(learner, x, None)
            parallel.step(learner, x, None)
        taken[f"{kind} {dead}"] = passes.call_count
    return taken


def same_state(parallel: Parallel, file: Path) -> dict[str, bool]:
    """Return, by tensor, whether a checkpoint's state has the same bits after it was taken over and given again."""
    made = plan("jumprelu")
    learner = Learner(
        made.config, optim=made.optim, precision=made.precision, split=parallel.split, shared=parallel.shared
    )
    prefix = "sae/sae/"
    state = {
        name.removeprefix(prefix): one
        for name, one in safetensors.torch.load_file(file).items()
        if name.startswith(prefix)
    }
    parallel.load_state(learner, state)
    again = parallel.state(learner)
    if not parallel.writes:
        return {"keeps nothing": not again}
    return {
        name: one.dtype == again[name].dtype and one.numpy().tobytes() == again[name].numpy().tobytes()
        for name, one in state.items()
    }


def look(folder: Path, job: dict[str, Any]) -> None:
    """Write what this process sees of itself."""
    parallel = Parallel.current(job["latents"], shard_parameters=job["shard"])
    found: dict[str, Any] = {"held": held(parallel)}
    if job["shard"] and job["latents"] == 1:
        found |= {"gradients": gradients(parallel), "gathered": gathered(parallel)}
    for name in job["states"]:
        file = max((folder / name / "checkpoints").glob("*.safetensors"))
        found[f"state of {name}"] = same_state(parallel, file)
    if not job["shard"]:
        found["fast"] = fast_paths(parallel)
    (folder / f"{job['name']}-{os.environ['RANK']}.json").write_text(json.dumps(found))


def main(folder: Path, jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        if "states" in job:
            look(folder, job)
            continue
        run = train(job["kind"], folder / job["name"], job["latents"], **job.get("settings", {}))
        assert run.processes == int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
