"""One file per architecture: the latents and the loss of a batch, in stored units."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from trimtab.sae.architectures import gated, jumprelu, matryoshka, standard, topk
from trimtab.sae.architectures.base import Scene, Split, Terms, Weights
from trimtab.sae.config import Architecture


class Functions(NamedTuple):
    """What an architecture computes of a batch."""

    forward: Callable[[Scene], Terms]
    """The loss, part by part."""
    latents: Callable[[Scene], Tensor]
    """[batch, d_sae] as training sees them, compute dtype."""


FUNCTIONS: dict[Architecture, Functions] = {
    "jumprelu": Functions(jumprelu.forward, jumprelu.latents),
    "topk": Functions(topk.forward, topk.latents),
    "batchtopk": Functions(topk.forward, topk.latents),
    "gated": Functions(gated.forward, gated.latents),
    "standard": Functions(standard.forward, standard.latents),
    "matryoshka-batchtopk": Functions(matryoshka.forward_batchtopk, topk.latents),
    "matryoshka-jumprelu": Functions(matryoshka.forward_jumprelu, jumprelu.latents),
}

__all__ = ["FUNCTIONS", "Functions", "Scene", "Split", "Terms", "Weights"]
