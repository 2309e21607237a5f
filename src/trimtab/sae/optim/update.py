"""Adam and its RMSprop form on stored parameters, rates and eps mapped, the decoder's rows held at their length.

With t the step from 1, gradient G and moments m, v:

    adam      m = b1 m + (1 - b1) G,  v = b2 v + (1 - b2) G^2,  p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    rmsprop   v as above,  p -= lr_t G / (sqrt(v) + eps_t),  lr_t = lr sqrt(1 - b2^t),  eps_t = eps sqrt(1 - b2^t)

Adam with b1 = 0 and rmsprop are the same map. Arithmetic is in the wide dtype, whatever is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.sae._threads import array, share
from trimtab.sae.config import OptimConfig
from trimtab.sae.precision import Precision
from trimtab.sae.scaling import Scales


@cache
def kernels() -> Any:
    """Import the compiled passes (about half a second, once)."""
    from trimtab.sae.optim import _kernels

    return _kernels


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
            total += _square(gradient) * (self._scales.of(name) / self._scales.loss) ** 2
        return math.sqrt(total)

    def step(self, gradients: Mapping[str, Tensor], low: Mapping[str, Tensor], *, lr: float, norm: float) -> None:
        """Move the parameters, and their low-precision copies with them.

        Args:
            gradients: of the stored parameters; weights may have another float dtype.
            low: copies by name; one that is the parameter itself moves as it does.
            lr: rate in unscaled units.
            norm: what `norm` said of the gradients; clipping goes by it.
        """
        self.steps += 1
        optim = self._optim
        clipped = 1.0 if optim.clip is None or norm <= optim.clip else optim.clip / norm
        for name, parameter in self._parameters.items():
            length = self._length if name == "W_dec" and optim.decoder_norm == "unit" else 0.0
            copy = low.get(name, parameter)
            move = self._compiled if _compilable(parameter, gradients[name], copy) else self._plain
            move(name, gradients[name], copy, clipped, length, self._rates(name, lr))
            if name == "threshold":
                parameter.clamp_(min=self._scales.map_parameter(name, SMALLEST_THRESHOLD))

    def _rates(self, name: str, lr: float) -> tuple[float, float, float]:
        """Return rate, root and eps of `p -= rate m / (sqrt(v) root + eps)`."""
        optim, t = self._optim, self.steps
        rate, eps = self._scales.map_lr(name, lr), self._scales.map_eps(name, optim.eps)
        whole = math.sqrt(1 - optim.beta2**t)
        if optim.optimizer == "rmsprop":
            return rate * whole, 1.0, eps * whole
        return rate / (1 - optim.beta1**t), 1 / whole, eps

    def _plain(
        self,
        name: str,
        gradient: Tensor,
        copy: Tensor,
        clipped: float,
        length: float,
        rates: tuple[float, float, float],
    ) -> None:
        """Move one parameter with torch: any device, any storage; arithmetic in the wide dtype."""
        parameter, optim = self._parameters[name], self._optim
        moved, gradient = parameter.to(self._wide), gradient.to(self._wide) * clipped
        rate, root, eps = rates
        if length:
            along = (moved * gradient).sum(1, keepdim=True) / moved.square().sum(1, keepdim=True)
            gradient = gradient - along * moved
        second = self.second[name].to(self._wide).mul_(optim.beta2).addcmul_(gradient, gradient, value=1 - optim.beta2)
        self.second[name].copy_(second)
        if name in self.first:
            gradient = self.first[name].to(self._wide).mul_(optim.beta1).add_(gradient, alpha=1 - optim.beta1)
            self.first[name].copy_(gradient)
        moved = moved - gradient * rate / (second.sqrt() * root + eps)
        if length:
            moved = moved * (length / moved.norm(dim=1, keepdim=True))
        parameter.copy_(moved)
        if copy is not parameter:
            copy.copy_(parameter)

    def _compiled(
        self,
        name: str,
        gradient: Tensor,
        copy: Tensor,
        clipped: float,
        length: float,
        rates: tuple[float, float, float],
    ) -> None:
        """Move one parameter in one pass over its rows."""
        parameter = self._parameters[name]
        rows = parameter if parameter.ndim == 2 else parameter[None]
        none = rows.new_empty(0, rows.shape[1])
        first = self.first[name].view_as(rows) if name in self.first else none
        optim = self._optim
        number = array(rows).dtype.type
        scalars = [number(one) for one in (clipped, optim.beta1, optim.beta2, *rates, length)]
        low = none if copy is parameter else copy.view_as(rows)
        tensors = (rows, gradient.view_as(rows), first, self.second[name].view_as(rows), low)
        share(kernels().adam_rows, len(rows), *map(array, tensors), *scalars)


def _compilable(parameter: Tensor, gradient: Tensor, copy: Tensor) -> bool:
    wide = (torch.float32, torch.float64)
    narrow = all(one.dtype in (*wide, torch.bfloat16) for one in (gradient, copy))
    return parameter.device.type == "cpu" and parameter.dtype in wide and narrow and gradient.is_contiguous()


def _square(values: Tensor) -> float:
    """Return the sum of squares, in float64."""
    if values.device.type != "cpu" or values.dtype == torch.float16:
        return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    flat = array(values.reshape(-1))
    part = max(1 << 16, -(-flat.size // 64))
    starts = range(0, flat.size, part)
    sums = np.zeros(len(starts))
    share(kernels().squares_of, len(starts), flat, sums, part, least=1)
    return float(sums.sum())
