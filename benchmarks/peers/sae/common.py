"""What every script of a trainer of autoencoders shares: the state that all begin from, and steps on request.

All begin from the same parameters on the same activations: a sparse dictionary's own features as encoder and decoder,
one threshold for all latents at which `l0` are active on average in the precision that is used. Thus losses and L0
agree as long as what is computed is the same. A process reads one JSON line, answers with one, and ends with its
standard input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Step = Callable[[torch.Tensor], tuple[float, float]]
"""Takes one step on a batch and returns loss and L0."""
BATCHES = 4
ROWS = 256


class State:
    """Activations and first parameters, the same in every process."""

    def __init__(self, d_in: int, d_sae: int, l0: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        raw = torch.randn(d_sae, d_in, generator=generator)
        self.features = raw / raw.norm(dim=1, keepdim=True)
        parts = []
        for _ in range(BATCHES):
            for _ in range(batch // ROWS):
                index = torch.randint(0, d_sae, (ROWS, l0), generator=generator)
                strength = torch.rand(ROWS, l0, generator=generator) + 0.5
                parts.append(torch.einsum("bk,bkd->bd", strength, self.features[index]))
        norm = torch.cat(parts).square().sum(1).mean().sqrt()
        self.batches = list((torch.cat(parts) / norm).split(batch))
        self.l0 = l0

    def threshold(self, compute: str) -> float:
        """Return the threshold at which `l0` latents are active, as the products of a dtype round."""
        dtype = torch.bfloat16 if compute == "bf16" else torch.float32
        pre = (self.batches[0].to(dtype) @ self.features.t().to(dtype)).float()
        return float(pre.flatten().kthvalue(pre.numel() - self.l0 * len(pre)).values)


def serve(make: Callable[[State, dict[str, Any]], Step]) -> None:
    """Answer requests: `{"state": ..., **options}` makes a trainer, `{"steps": n}` runs it."""
    step: Step | None = None
    state: State | None = None
    count = 0
    for line in sys.stdin:
        asked = json.loads(line)
        if "state" in asked:
            torch.set_num_threads(asked["threads"])
            state, count = State(**asked.pop("state")), 0
            _reset_peak()
            before = _status("VmRSS")
            step = make(state, asked)
            answer: dict[str, Any] = {"before": before}
        elif "gemm" in asked:
            assert state is not None
            answer = {"flops": _gemm(state, getattr(torch, asked["gemm"]))}
        else:
            assert step is not None and state is not None
            cpu, wall = time.process_time(), time.perf_counter()
            losses = []
            for number in range(count, count + asked["steps"]):
                losses.append(step(state.batches[number % BATCHES]))
            count += asked["steps"]
            answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "losses": losses}
            answer["peak"] = _status("VmHWM")
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _gemm(state: State, dtype: torch.dtype) -> float:
    """Return the floating point operations per CPU second of the encoder's product."""
    x, weight = state.batches[0].to(dtype), state.features.t().contiguous().to(dtype)
    out = x @ weight
    count = 4
    start = time.process_time()
    for _ in range(count):
        torch.matmul(x, weight, out=out)
    return count * 2 * x.shape[0] * weight.numel() / (time.process_time() - start)


def _status(name: str) -> int:
    """Return a size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _reset_peak() -> None:
    """Let the peak begin with what is in use now, so that imports do not count."""
    Path("/proc/self/clear_refs").write_text("5")


os.environ.setdefault("WANDB_MODE", "disabled")
