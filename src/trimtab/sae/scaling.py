"""Scales: what stored numbers are, beside the unscaled network that they stand for.

With a prime for what is stored, s the input scale, b_e and b_d the scales of the weights, c the activation multiplier
before the decoder and g the gradient scale:

    x' = s x       W_enc' = b_e W_enc    W_dec' = b_d W_dec    b_enc' = s b_e b_enc    b_dec' = s b_dec
    pre' = (x' - b_dec') W_enc' + b_enc' = s b_e pre           threshold', bandwidth' = s b_e (threshold, bandwidth)
    y' = (c z') W_dec' + kappa b_dec'    kappa = b_e c b_d     target' = kappa s y     y' - target' = S (y_hat - y)
    loss' = g S^2 loss                   S = s kappa           dloss'/dp' = (g S^2 / sigma_p) dloss/dp

where sigma_p is the scale that parameter p is stored with. Adam moves p' by its rate whatever the gradient, so a rate
lr becomes sigma_p lr and eps becomes eps g S^2 / sigma_p: the scaled run then *is* the unscaled one, bit for bit where
the scales are powers of two and nothing leaves the dtype's range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import RecipeError

if TYPE_CHECKING:
    from trimtab.sae.config import SAEConfig
    from trimtab.sae.precision import Precision


def power_of_two(value: float) -> float:
    """Return the power of two next to a positive number, by ratio."""
    return float(2.0 ** round(math.log2(value)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """How stored numbers stand to unscaled ones; all positive."""

    s: float = 1.0
    """Of the activations."""
    b_e: float = 1.0
    """Of the encoder's weights."""
    b_d: float = 1.0
    """Of the decoder's weights."""
    c: float = 1.0
    """Multiplies the latents before the decoder."""
    g: float = 1.0
    """Of the loss, hence of every gradient."""
    norm: float = 1.0
    """Root of the mean squared length of the raw activations, by which the caller divided them; kept for files only."""

    def __post_init__(self) -> None:
        for name in ("s", "b_e", "b_d", "c", "g", "norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise RecipeError(f"the scale {name} is {value!r}; a finite number above 0 was expected")

    @property
    def kappa(self) -> float:
        """What the decoder's output is scaled by, beyond the input's own scale."""
        return self.b_e * self.c * self.b_d

    @property
    def total(self) -> float:
        """S, the scale of the reconstruction and its error."""
        return self.s * self.kappa

    @property
    def pre(self) -> float:
        """Scale of pre-activations, latents, thresholds and bandwidths."""
        return self.s * self.b_e

    @property
    def loss(self) -> float:
        """G S^2, the scale of the loss."""
        return self.g * self.total**2

    def of(self, name: str) -> float:
        """Return sigma_p, the scale that a parameter is stored with."""
        return {"W_enc": self.b_e, "W_dec": self.b_d, "b_dec": self.s, "r_mag": 1.0}.get(name, self.pre)

    def map_parameter(self, name: str, value: float) -> float:
        """Return what is stored for an unscaled value of a parameter."""
        return value * self.of(name)

    def map_lr(self, name: str, lr: float) -> float:
        """Return the rate of a stored parameter."""
        return lr * self.of(name)

    def map_gradient(self, name: str, gradient: float) -> float:
        """Return the gradient with respect to a stored parameter, from the unscaled one."""
        return gradient * (self.loss / self.of(name))

    def map_eps(self, name: str, eps: float) -> float:
        """Return what is added to the root of the second moment of a stored parameter."""
        return self.map_gradient(name, eps)

    @classmethod
    def unit(cls) -> Scales:
        """Return scales that change nothing."""
        return cls()

    @classmethod
    def choose(cls, config: SAEConfig, measured: Mapping[str, float], precision: Precision) -> Scales:
        """Return powers of two under which every operand of a matrix product is near 1.

        Args:
            config: the autoencoder.
            measured: what is known of the run, all of it optional: `batch_size` (4096), `error`, the mean squared error
                per token that the run will settle at (0.1), `norm`, and `g`, a recommended gradient scale.
            precision: float16 needs scales; float32 and bfloat16 have the exponents to do without, and get none.
        """
        norm = float(measured.get("norm", 1.0))
        if not precision.narrow:
            return cls(norm=norm)
        entry = power_of_two(math.sqrt(config.d_in))
        row = power_of_two(math.sqrt(config.output) / config.decoder_norm)
        encoder = power_of_two(math.sqrt(config.d_in) * config.decoder_norm / config.first_encoder_norm)
        scales = cls(s=entry, b_e=encoder, b_d=row, c=1 / (encoder * row), norm=norm)
        if "g" in measured:
            g = power_of_two(float(measured["g"]))
        else:
            error = math.sqrt(float(measured.get("error", 0.1)) / config.output)
            unit = float(measured.get("batch_size", 4096)) / (2 * scales.total * error)
            g = power_of_two(unit / 64)  # reductions over a batch and over latents multiply the unit entry
        return cls(s=scales.s, b_e=scales.b_e, b_d=scales.b_d, c=scales.c, g=g, norm=norm)
