"""What every architecture is given, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.sae import fused
from trimtab.sae.config import SAEConfig
from trimtab.sae.precision import Precision
from trimtab.sae.scaling import Scales


class Terms(NamedTuple):
    """The loss, part by part, in unscaled units, and who fired; `loss = recon + sparsity + aux`."""

    recon: Tensor
    """Mean squared error per token, wide, a scalar."""
    sparsity: Tensor
    """The penalty with its coefficient."""
    aux: Tensor
    """Auxiliary losses with their coefficients."""
    fired: Tensor
    """[d_sae] tokens of the batch on which each latent fired, int64."""
    cut: Tensor | None = None
    """BatchTopK kinds: the smallest latent that was kept, stored units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One batch before one set of parameters, all in stored units."""

    config: SAEConfig
    scales: Scales
    precision: Precision
    parameters: Mapping[str, Tensor]
    """What gets gradients."""
    low: Mapping[str, Tensor]
    """W_enc and W_dec in the compute dtype."""
    x: Tensor
    """[batch, d_in], wide."""
    target: Tensor
    """[batch, d_out], wide."""
    coefficient: float
    """Of the sparsity, now."""
    dead: Tensor | None
    """[d_sae] latents that have not fired for long; None: nobody asks."""
    unit_decoder: bool
    """Whether the decoder's rows are held at their first length."""

    def encode(self, *, bias: str | None = "b_enc") -> Tensor:
        """Return pre-activations [batch, d_sae] in the compute dtype."""
        p = self.parameters
        centre = p["b_dec"] if self.config.centres else None
        return fused.encode(self.x, centre, p["W_enc"], None if bias is None else p[bias], self.low["W_enc"])

    def decode(self, z: Tensor, *, prefix: int | None = None, bias: bool = True, frozen: bool = False) -> Tensor:
        """Return the reconstruction [batch, d_out] of latents, the first `prefix` only, the decoder `frozen` or not."""
        weight, low, b_dec = self.parameters["W_dec"], self.low["W_dec"], self.parameters["b_dec"]
        if prefix is not None:
            z, weight, low = z[:, :prefix], weight[:prefix], low[:prefix]
        if frozen:
            weight, b_dec = weight.detach(), b_dec.detach()
        c = self.scales.c
        wide, kappa = self.precision.wide, self.scales.kappa
        return fused.decode(z if c == 1 else z * c, weight, b_dec if bias else None, low, wide, kappa)

    def squared(self, error: Tensor) -> Tensor:
        """Return the mean over tokens of the squared length of an error, unscaled."""
        return error.square().sum() / (error.shape[0] * self.scales.total**2)

    def norms(self) -> Tensor | float:
        """Return the lengths of the decoder's rows, unscaled: [d_sae], or one number where they are held."""
        if self.unit_decoder:
            return self.config.decoder_norm
        lengths: Tensor = self.parameters["W_dec"].to(self.precision.wide).norm(dim=1)
        return lengths / self.scales.b_d

    @property
    def zero(self) -> Tensor:
        """A term that is not there."""
        return torch.zeros((), dtype=self.precision.wide, device=self.x.device)


Forward = Callable[[Scene], Terms]
"""The loss of an architecture."""
