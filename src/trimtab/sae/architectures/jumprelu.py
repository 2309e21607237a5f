"""JumpReLU: a threshold per latent, trained through a rectangle kernel, and a penalty on what passes it.

Step penalty: lambda L0 (Rajamanoharan et al. 2024). Tanh penalty: lambda sum tanh(c z |d|) (Anthropic 2025), both with
the pre-activation loss lambda_P sum relu(threshold - pre) |d| where it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.sae import fused
from trimtab.sae.architectures.base import Scene, Terms


def activate(scene: Scene, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents and how many are active."""
    bandwidth = scene.config.kernel * scene.scales.pre
    return fused.jump(pre, scene.parameters["threshold"], bandwidth, to_input=scene.config.ste_to_input)


def penalties(scene: Scene, pre: Tensor, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sparsity penalty and the pre-activation loss, with their coefficients."""
    config, scales, batch = scene.config, scene.scales, pre.shape[0]
    wide = scene.precision.wide
    if config.penalty == "step":
        sparsity = scene.whole(count) / batch
    else:
        steep = config.steepness / scales.pre
        sparsity = scene.whole(torch.tanh(z.to(wide) * (steep * scene.norms())).sum()) / batch
    aux = scene.zero
    if config.pre_act_coefficient:
        below = torch.relu(scene.parameters["threshold"] - pre.to(wide)) * scene.norms()
        aux = scene.whole(below.sum()) * (config.pre_act_coefficient / (batch * scales.pre))
    return sparsity * scene.coefficient, aux


def latents(scene: Scene) -> Tensor:
    """Return the latents of a batch."""
    return activate(scene, scene.encode())[0]


def forward(scene: Scene) -> Terms:
    """Return the loss of a batch."""
    pre = scene.encode()
    z, count = activate(scene, pre)
    recon = scene.squared(scene.decode(z) - scene.target)
    sparsity, aux = penalties(scene, pre, z, count)
    return Terms(recon, sparsity, aux, (z > 0).sum(0))
