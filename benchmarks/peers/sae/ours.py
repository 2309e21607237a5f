"""Autoencoders by trimtab."""

from __future__ import annotations

import time
from typing import Any

import torch
from common import State, Step, serve

from trimtab.sae import Learner, OptimConfig, Precision, SAEConfig


def make(state: State, asked: dict[str, Any]) -> Step:
    d_sae, d_in = state.features.shape
    kind: dict[str, Any] = {"architecture": asked["kind"], "k": state.l0} if asked["kind"] == "topk" else {}
    config = SAEConfig(
        d_in=d_in, d_sae=d_sae, threshold=state.threshold(asked["compute"]), bandwidth=asked["bandwidth"],
        sparsity_coefficient=asked["l0_coefficient"], **kind,
    )  # fmt: skip
    # The same step as the peers': no constraint on the decoder, their clipping.
    optim = OptimConfig(lr=asked["lr"], warmup=0, decay=0.0, clip=1.0, decoder_norm="free")
    learner = Learner(config, optim=optim, precision=Precision.parse("fp32", asked["compute"]), total_steps=100_000)
    whole = {name: one.clone() for name, one in learner.state().items()}
    whole["parameter.W_enc"].copy_(state.features)
    whole["parameter.W_dec"].copy_(state.features)
    learner.load_state(whole)
    if asked.get("parts"):
        return _parts(learner)

    def step(x: torch.Tensor) -> tuple[float, float]:
        found = learner.step(x)
        return found.loss, found.l0

    return step


def _parts(learner: Learner) -> Step:
    """Seconds in gradients and in the update instead of loss and L0: where the time goes."""

    def step(x: torch.Tensor) -> tuple[float, float]:
        start = time.perf_counter()
        computed = learner.compute(x)
        middle = time.perf_counter()
        learner.apply(computed)
        return middle - start, time.perf_counter() - middle

    return step


if __name__ == "__main__":
    serve(make)
