"""What every architecture is given, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
    """[latents here] tokens of the batch on which each latent fired, int64."""
    cut: Tensor | None = None
    """BatchTopK kinds: the smallest latent that was kept, stored units."""


class Split(Protocol):
    """Latents spread over processes that see the same tokens, every one a contiguous range; tokens over others.

    A process has the rows of W_enc and W_dec and the elements of b_enc, thresholds and counters that are its own, and
    all of b_dec. With these operations each computes the loss of the whole and the gradients of its part.
    """

    def own(self, d_sae: int) -> slice:
        """Return the range of latents that this process holds."""
        ...

    def reduce(self, partial: Tensor) -> Tensor:
        """Return the sum over processes; its gradient passes to each unchanged."""
        ...

    def share(self, whole: Tensor) -> Tensor:
        """Return what every process holds alike, unchanged; its gradient is summed over processes."""
        ...

    @property
    def batches(self) -> int:
        """How many parts of the batch there are: processes that see different tokens."""
        ...

    def batch_sum(self, partial: Tensor) -> Tensor:
        """Return the sum over the parts of the batch; it has no gradient."""
        ...

    def kth_largest(self, largest: Tensor, k: int, *, batch: bool) -> Tensor:
        """Return the k-th largest over processes [rows, 1], from the largest of each [rows, at most k].

        Of every row, or, with one row, of the whole batch.
        """
        ...


class Weights(NamedTuple):
    """What a batch is computed with, in stored units."""

    parameters: Mapping[str, Tensor]
    """What gets gradients."""
    low: Mapping[str, Tensor]
    """W_enc and W_dec in the compute dtype."""


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
    """[latents here] which have not fired for long; None: nobody asks."""
    unit_decoder: bool
    """Whether the decoder's rows are held at their first length."""
    split: Split | None = None
    """How latents are spread over processes; None: they are all here."""
    watch: Callable[[str, Tensor], None] | None = None
    """Is told of activations by name, before their gradients are known."""

    def encode(self, *, bias: str | None = "b_enc") -> Tensor:
        """Return pre-activations [batch, d_sae] in the compute dtype."""
        p = self.parameters
        centre = p["b_dec"] if self.config.centres else None
        if centre is not None and self.split is not None:
            centre = self.split.share(centre)
        pre = fused.encode(self.x, centre, p["W_enc"], None if bias is None else p[bias], self.low["W_enc"])
        if self.watch is not None:
            self.watch("pre", pre)
        return pre

    def write(self, z: Tensor, *, rows: slice | None = None, frozen: bool = False) -> Tensor:
        """Return what latents write [batch, d_out], without the bias.

        Args:
            z: [batch, latents], as many as there are `rows`.
            rows: of the decoder; None: all.
            frozen: give the decoder no gradient.
        """
        weight, low = self.parameters["W_dec"], self.low["W_dec"]
        if rows is not None:
            weight, low = weight[rows], low[rows]
        multiplied = z if self.scales.c == 1 else z * self.scales.c
        partial = fused.decode(multiplied, weight.detach() if frozen else weight, low, self.precision.wide)
        if self.watch is not None:
            self.watch("z", multiplied)
            self.watch("y", partial)
        return partial if self.split is None else self.split.reduce(partial)

    def offset(self, *, frozen: bool = False) -> Tensor:
        """Return the decoder's bias [d_out] at the scale of its output, wide."""
        bias = self.parameters["b_dec"].to(self.precision.wide) * self.scales.kappa
        return bias.detach() if frozen else bias

    def whole(self, partial: Tensor) -> Tensor:
        """Return the sum over all latents, from the sum over those that are here."""
        return partial if self.split is None else self.split.reduce(partial)

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction [batch, d_out]."""
        return self.write(z) + self.offset()

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
