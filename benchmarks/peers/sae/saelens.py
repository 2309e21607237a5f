"""Autoencoders by sae-lens."""

from __future__ import annotations

from typing import Any

import torch
from common import State, Step, serve
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer


def make(state: State, asked: dict[str, Any]) -> Step:
    d_sae, d_in = state.features.shape
    sizes = {"d_in": d_in, "d_sae": d_sae, "normalize_activations": "none", "apply_b_dec_to_input": True}
    if asked["kind"] == "topk":
        # Decoder rows have length 1, so leaving the rescaling out spares it work without a change of result.
        sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(k=state.l0, rescale_acts_by_decoder_norm=False, **sizes))
    else:
        config = JumpReLUTrainingSAEConfig(
            jumprelu_init_threshold=state.threshold(asked["compute"]), jumprelu_bandwidth=asked["bandwidth"],
            l0_coefficient=asked["l0_coefficient"], **sizes,
        )  # fmt: skip
        sae = JumpReLUTrainingSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(state.features.t())
        sae.W_dec.copy_(state.features)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    batch = len(state.batches[0])
    settings = SAETrainerConfig(
        total_training_samples=100_000 * batch, train_batch_size_samples=batch, lr=asked["lr"], lr_end=asked["lr"],
        adam_beta1=0.0, autocast=asked["compute"] == "bf16",
    )  # fmt: skip
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter(()))

    def step(x: torch.Tensor) -> tuple[float, float]:
        found = trainer.step(x)
        trainer.n_training_steps += 1
        return float(found.loss.detach()), float((found.feature_acts > 0).sum()) / batch

    return step


if __name__ == "__main__":
    serve(make)
