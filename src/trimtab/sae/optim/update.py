"""Adam and its RMSprop form on stored parameters, rates and eps mapped, the decoder's rows held at their length.

With t the step from 1, gradient G and moments m, v:

    adam      m = b1 m + (1 - b1) G,  v = b2 v + (1 - b2) G^2,  p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    rmsprop   v as above,  p -= lr_t G / (sqrt(v) + eps_t),  lr_t = lr sqrt(1 - b2^t),  eps_t = eps sqrt(1 - b2^t)

Adam with b1 = 0 and rmsprop are the same map. Arithmetic is in the wide dtype, whatever is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trimtab.sae.config import OptimConfig
from trimtab.sae.precision import Precision
from trimtab.sae.scaling import Scales

SMALLEST_THRESHOLD = 1e-8
"""No threshold falls under it, in unscaled units."""


class Updater:
    """The moments of every parameter, and how a step moves it.

    Args:
        optim: rates, decays, clipping, the decoder's constraint.
        parameters: stored, by name; they are changed in place.
        scales: how they stand to the unscaled ones.
        precision: moments are stored as the parameters are, those of thresholds wide.
        decoder_norm: unscaled length that the decoder's rows are held at.
    """

    def __init__(
        self,
        optim: OptimConfig,
        parameters: Mapping[str, Tensor],
        scales: Scales,
        precision: Precision,
        *,
        decoder_norm: float,
    ) -> None:
        self._optim, self._parameters, self._scales, self._wide = optim, parameters, scales, precision.wide
        self._length = decoder_norm * scales.b_d
        self.first: dict[str, Tensor] = {}
        if optim.optimizer == "adam" and optim.beta1 > 0:
            self.first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.steps = 0

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        """Return the length of the unscaled gradient; not finite when an element is not."""
        total = 0.0
        for name, gradient in gradients.items():
            length = float(gradient.to(self._wide).norm())
            total += (length * (self._scales.of(name) / self._scales.loss)) ** 2
        return math.sqrt(total)

    def step(self, gradients: Mapping[str, Tensor], *, lr: float, norm: float) -> None:
        """Move the parameters.

        Args:
            gradients: of the stored parameters.
            lr: rate in unscaled units.
            norm: what `norm` said of the gradients; clipping goes by it.
        """
        self.steps += 1
        optim = self._optim
        clipped = 1.0 if optim.clip is None or norm <= optim.clip else optim.clip / norm
        for name, parameter in self._parameters.items():
            gradient = gradients[name].to(self._wide) * clipped
            moved = parameter.to(self._wide)
            held = name == "W_dec" and optim.decoder_norm == "unit"
            if held:
                along = (moved * gradient).sum(1, keepdim=True) / moved.square().sum(1, keepdim=True)
                gradient = gradient - along * moved
            moved = moved - self._change(name, gradient, lr)
            if held:
                moved = moved * (self._length / moved.norm(dim=1, keepdim=True))
            if name == "threshold":
                moved = moved.clamp(min=self._scales.map_parameter(name, SMALLEST_THRESHOLD))
            parameter.copy_(moved)

    def _change(self, name: str, gradient: Tensor, lr: float) -> Tensor:
        optim, t = self._optim, self.steps
        rate, eps = self._scales.map_lr(name, lr), self._scales.map_eps(name, optim.eps)
        second = self.second[name].to(self._wide).mul_(optim.beta2).addcmul_(gradient, gradient, value=1 - optim.beta2)
        self.second[name].copy_(second)
        whole = math.sqrt(1 - optim.beta2**t)
        if optim.optimizer == "rmsprop":
            return gradient * (rate * whole) / (second.sqrt() + eps * whole)
        if self.first:
            gradient = self.first[name].to(self._wide).mul_(optim.beta1).add_(gradient, alpha=1 - optim.beta1)
            self.first[name].copy_(gradient)
        return gradient * (rate / (1 - optim.beta1**t)) / (second.sqrt() / whole + eps)
