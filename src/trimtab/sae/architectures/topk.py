"""TopK and BatchTopK: the k largest latents of a token, or k per token of a whole batch, and no penalty.

Dead latents learn by the auxiliary loss (Gao et al. 2024): the largest of them reconstruct the error e that is left,
`alpha |e - e_hat|^2 / |e - mean e|^2`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.sae.architectures.base import Scene, Terms


def largest(scene: Scene, z: Tensor, k: int, *, batch: bool = False) -> Tensor:
    """Return the latents with all but the k largest of every row, or of the batch k per row on average, set to 0."""
    rows = z.reshape(1, -1) if batch else z
    parts = scene.split.batches if scene.split is not None else 1
    wanted = k * len(z) * parts if batch else k
    values, index = rows.topk(min(wanted, rows.shape[1]), dim=1)
    if scene.split is not None:
        cut = scene.split.kth_largest(values.detach(), wanted, batch=batch)
        values = torch.where(values >= cut, values, 0)
    return torch.zeros_like(rows).scatter(1, index, values).reshape(z.shape)


def auxiliary(scene: Scene, active: Tensor, error: Tensor) -> Tensor:
    """Return the loss of the dead latents, with its coefficient.

    Args:
        scene: the batch.
        active: [batch, d_sae] latents before the selection.
        error: [batch, d_out] target less reconstruction; it gets no gradient.
    """
    if scene.dead is None or not scene.whole(scene.dead.any().float()):
        return scene.zero
    chosen = largest(scene, torch.where(scene.dead, active, 0), scene.config.dead_k)
    left = error.detach()
    if scene.split is None:
        spread = (left - left.mean(0)).square().sum()
    else:  # the mean over the parts of the batch is what counts
        mean = scene.split.batch_sum(left.sum(0)) / (len(left) * scene.split.batches)
        spread = scene.split.batch_sum((left - mean).square().sum()) / scene.split.batches
    return (scene.write(chosen) - left).square().sum() / spread * scene.config.aux_coefficient


def latents(scene: Scene) -> Tensor:
    """Return the latents of a batch."""
    assert scene.config.k is not None
    return largest(scene, torch.relu(scene.encode()), scene.config.k, batch=scene.config.architecture != "topk")


def cut_of(scene: Scene, z: Tensor) -> Tensor:
    """Return the smallest latent that was kept, infinite where none was."""
    return torch.where(z > 0, z, torch.inf).detach().amin()


def forward(scene: Scene) -> Terms:
    """Return the loss of a batch."""
    assert scene.config.k is not None
    active = torch.relu(scene.encode())
    batch = scene.config.architecture != "topk"
    z = largest(scene, active, scene.config.k, batch=batch)
    error = scene.target - scene.decode(z)
    aux = auxiliary(scene, active, error)
    return Terms(scene.squared(error), scene.zero, aux, (z > 0).sum(0), cut_of(scene, z) if batch else None)
