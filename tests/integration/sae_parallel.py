"""What every process of `test_sae_parallel.py` runs: trainings of several kinds, one after the other."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.sae.config import OptimConfig, SAEConfig
from trimtab.sae.data import Stream, StreamConfig, SyntheticSource
from trimtab.sae.precision import Precision
from trimtab.sae.synthetic import SparseDictionary
from trimtab.sae.train import Plan, TrainConfig, train_stream

STEPS = 20
KINDS: dict[str, dict[str, Any]] = {
    "jumprelu": {"pre_act_coefficient": 1e-3},
    "topk": {"k": 4, "dead_tokens": 300},
    "batchtopk": {"k": 4, "dead_tokens": 300},
    "gated": {},
    "standard": {},
    "matryoshka-batchtopk": {"k": 4, "widths": (10, 50)},
    "matryoshka-jumprelu": {"penalty": "tanh"},
}


def plan(kind: str, *, low: bool = False, scaled: bool = False) -> Plan:
    config = SAEConfig(architecture=kind, d_in=16, d_sae=50, **KINDS[kind])  # type: ignore[arg-type]
    optim = OptimConfig(lr=3e-3, warmup=4, clip=0.5, beta1=0.9 if kind == "gated" else 0.0)
    optim = replace(optim, target_l0=5.0) if kind == "jumprelu" else optim
    precision = Precision(torch.float32, torch.bfloat16) if low else Precision()
    return Plan(name="sae", config=config, optim=optim, precision=precision, adam_trick=scaled, seed=7)


def train(kind: str, out: Path, latents: int, **given: Any) -> Any:
    source = SyntheticSource(SparseDictionary(32, 16, mean_active=3), rows=5000, chunk_rows=100)
    stream = Stream(source, StreamConfig(batch_size=64, buffer_rows=256, held_out=128, seed=3))
    settings = {"steps": STEPS, "eval_every": 10, "save_every": 10, "shard_latents": latents, **given}
    return train_stream(plan(kind), stream, TrainConfig(**settings), out=out)


def main(folder: Path, jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        run = train(job["kind"], folder / job["name"], job["latents"], **job.get("settings", {}))
        assert run.processes == int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
