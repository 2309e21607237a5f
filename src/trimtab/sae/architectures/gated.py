"""Gated autoencoders (Rajamanoharan et al. 2024): one weight, two readings of it.

    gate pi = (x - b_dec) W_enc + b_enc       magnitude m = (x - b_dec) W_enc exp(r_mag) + b_mag
    z = 1[pi > 0] relu(m)                     loss = |y - y_hat|^2 + lambda sum relu(pi) |d| + |y - y_hat(relu(pi))|^2

The last term trains the gate; its decoder and bias are frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.sae.architectures.base import Scene, Terms
from trimtab.sae.architectures.standard import l1


def _read(scene: Scene) -> tuple[Tensor, Tensor]:
    """Return the latents and the open part of the gate."""
    raw = scene.encode(bias=None)
    p, wide = scene.parameters, scene.precision.wide
    gate = raw + p["b_enc"].to(wide)
    magnitude = raw * p["r_mag"].to(wide).exp() + p["b_mag"].to(wide)
    z = torch.where(gate > 0, torch.relu(magnitude), 0)
    return z.to(raw.dtype), torch.relu(gate)


def latents(scene: Scene) -> Tensor:
    """Return the latents of a batch."""
    return _read(scene)[0]


def forward(scene: Scene) -> Terms:
    """Return the loss of a batch."""
    z, gate = _read(scene)
    recon = scene.squared(scene.decode(z) - scene.target)
    by_gate = scene.write(gate.to(z.dtype), frozen=True) + scene.offset(frozen=True)
    aux = scene.squared(by_gate - scene.target)
    return Terms(recon, l1(scene, gate), aux, (z > 0).sum(0))
