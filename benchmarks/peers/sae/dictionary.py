"""Autoencoders by dictionary-learning; it has no autocast on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from common import State, Step, serve
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.top_k import TopKTrainer


def make(state: State, asked: dict[str, Any]) -> Step:
    d_sae, d_in = state.features.shape
    common = {
        "steps": 100_000, "activation_dim": d_in, "dict_size": d_sae, "layer": 0, "lm_name": "none", "lr": asked["lr"],
        "warmup_steps": 1, "device": "cpu",
    }  # fmt: skip
    if asked["kind"] == "topk":
        trainer: Any = TopKTrainer(k=state.l0, **common)
        with torch.no_grad():
            trainer.ae.encoder.weight.copy_(state.features)
            trainer.ae.decoder.weight.copy_(state.features.t())
    else:
        trainer = JumpReluTrainer(
            target_l0=state.l0, sparsity_penalty=asked["l0_coefficient"], bandwidth=asked["bandwidth"],
            sparsity_warmup_steps=1, **common,
        )  # fmt: skip
        with torch.no_grad():
            trainer.ae.W_enc.copy_(state.features.t())
            trainer.ae.W_dec.copy_(state.features)
            trainer.ae.threshold.fill_(state.threshold(asked["compute"]))
    count = 0

    def step(x: torch.Tensor) -> tuple[float, float]:
        nonlocal count
        count += 1
        loss = trainer.update(count, x)
        return float(loss or 0.0), float(state.l0)

    return step


if __name__ == "__main__":
    serve(make)
