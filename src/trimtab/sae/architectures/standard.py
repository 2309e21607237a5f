"""The standard autoencoder: ReLU, and lambda sum z |d|, the L1 norm weighed by the decoder's rows."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.sae.architectures.base import Scene, Terms


def l1(scene: Scene, z: Tensor) -> Tensor:
    """Return lambda times the mean over tokens of sum z |d|."""
    weighed = z.to(scene.precision.wide) * scene.norms()
    return scene.whole(weighed.sum()) * (scene.coefficient / (len(z) * scene.scales.pre))


def latents(scene: Scene) -> Tensor:
    """Return the latents of a batch."""
    return torch.relu(scene.encode())


def forward(scene: Scene) -> Terms:
    """Return the loss of a batch."""
    z = latents(scene)
    recon = scene.squared(scene.decode(z) - scene.target)
    return Terms(recon, l1(scene, z), scene.zero, (z > 0).sum(0))
