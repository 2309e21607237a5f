"""Small autoencoders with random parameters, and a stand-in for what trained them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from trimtab.sae.model import SAE

D_IN, D_SAE = 12, 40


def config(kind: str, d_out: int | None = None) -> Any:
    """What a learner's configuration says that `SAE.of` reads."""
    k = 6 if "topk" in kind else None
    return SimpleNamespace(architecture=kind, k=k, d_out=d_out, centres=d_out is None)


def parameters(kind: str, d_out: int | None = None) -> dict[str, Tensor]:
    """Parameters of one kind, for activations whose mean squared length is 1."""
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))

    def draw(*shape: int, by: float) -> Tensor:
        return torch.randn(shape, generator=generator) * by

    width = d_out or D_IN
    found = {
        "W_enc": draw(D_IN, D_SAE, by=0.3),
        "W_dec": draw(D_SAE, width, by=0.3),
        "b_dec": draw(width, by=0.1),
    }
    if kind == "gated":
        names = {"b_gate": 0.1, "b_mag": 0.1, "r_mag": 0.2}
        return found | {name: draw(D_SAE, by=by) for name, by in names.items()}
    found["b_enc"] = draw(D_SAE, by=0.1)
    if kind in ("jumprelu", "matryoshka-jumprelu"):
        found["threshold"] = draw(D_SAE, by=0.2).abs()
    if kind in ("batchtopk", "matryoshka-batchtopk"):
        found["threshold"] = torch.tensor(0.35)
    return found


@dataclass
class Learned:
    """What a learner gives of itself."""

    config: Any
    tensors: dict[str, Tensor]

    def parameters_unscaled(self) -> dict[str, Tensor]:
        return self.tensors


def sae(kind: str = "jumprelu", *, norm: float = 1.0, site: str = "", **more: Any) -> SAE:
    """One autoencoder of a kind."""
    return SAE.of(Learned(config(kind), parameters(kind)), norm=norm, site=site, **more)
