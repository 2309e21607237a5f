"""Small learners of every architecture, and activations for them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from trimtab.sae import Learner, OptimConfig, Precision, SAEConfig, Scales, SparseDictionary

D_IN, D_SAE, BATCH = 16, 48, 64
EXACT = Precision(torch.float64, torch.float64)
DICTIONARY = SparseDictionary(64, D_IN, mean_active=4)
_SMALL = {"bandwidth": 0.1, "threshold": 0.05}
_SPARSE = {"bandwidth": 0.03, "threshold": 0.25}
CONFIGS: dict[str, dict[str, Any]] = {
    "jumprelu": {"architecture": "jumprelu", **_SMALL},
    "jumprelu-sparse": {"architecture": "jumprelu", **_SPARSE, "ste_to_input": True},
    "jumprelu-tanh": {
        "architecture": "jumprelu", **_SMALL, "penalty": "tanh", "ste_to_input": True, "pre_act_coefficient": 1e-3,
    },
    "topk": {"architecture": "topk", "k": 5, "dead_tokens": 1, "aux_k": 6},
    "batchtopk": {"architecture": "batchtopk", "k": 5, "dead_tokens": 1, "aux_k": 6},
    "gated": {"architecture": "gated", "sparsity_coefficient": 0.01},
    "standard": {"architecture": "standard", "sparsity_coefficient": 0.01},
    "matryoshka-batchtopk": {"architecture": "matryoshka-batchtopk", "k": 5, "dead_tokens": 1, "aux_k": 6},
    "matryoshka-jumprelu": {"architecture": "matryoshka-jumprelu", **_SMALL},
}  # fmt: skip
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam", "beta1": 0.9},
    "adam-free-clipped": {"optimizer": "adam", "decoder_norm": "free", "clip": 0.05},
    "rmsprop": {"optimizer": "rmsprop"},
}


def config(name: str, **settings: Any) -> SAEConfig:
    """A small autoencoder of a kind."""
    return SAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, **CONFIGS[name], **settings})


def learner(name: str, *, optim: dict[str, Any] | None = None, general: bool = False, **settings: Any) -> Learner:
    """A learner of a kind in float64; `general` keeps it off the compiled passes."""
    settings = {"precision": EXACT, "scales": Scales.unit(), "total_steps": 60, **settings}
    made = Learner(config(name), optim=OptimConfig(**{"lr": 3e-3, "warmup": 5, **(optim or {})}), **settings)
    made.fast = not general
    return made


def scales(seed: int, *, kappa_is_one: bool = False) -> Scales:
    """Random scales, 2^-6 to 2^6 each."""
    draw = random.Random(seed)
    s, b_e, b_d, c, g = (2 ** draw.uniform(-6, 6) for _ in range(5))
    return Scales(s=s, b_e=b_e, b_d=b_d, c=1 / (b_e * b_d) if kappa_is_one else c, g=g)


def batches(count: int, *, size: int = BATCH) -> list[Tensor]:
    """Activations of mean squared length 1, the last quarter of the features' dictionary rarely seen."""
    return [DICTIONARY.sample(size, index=number) for number in range(count)]


def apart(left: Learner, right: Learner) -> float:
    """The largest difference of their unscaled parameters."""
    mine, other = left.parameters_unscaled(), right.parameters_unscaled()
    assert mine.keys() == other.keys()
    return max(float((mine[name] - other[name]).abs().max()) for name in mine)
