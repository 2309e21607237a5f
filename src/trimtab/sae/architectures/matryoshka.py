"""Matryoshka autoencoders (Bussmann et al. 2025): nested prefixes of the latents each reconstruct on their own.

    loss = sum over prefixes of |y - y_hat(z[:prefix])|^2, on top of BatchTopK's or JumpReLU's other terms

The error of the whole is the reconstruction term; those of the inner prefixes are auxiliary.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from trimtab.sae.architectures import jumprelu, topk
from trimtab.sae.architectures.base import Scene, Terms


def _errors(scene: Scene, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return target less reconstruction of all latents, and the sum of the inner prefixes' squared errors."""
    first = 0 if scene.split is None else scene.split.own(scene.config.d_sae).start
    ends = [min(max(end - first, 0), z.shape[1]) for end in (0, *scene.config.prefixes)]
    inner, error = scene.zero, scene.target - scene.offset()
    for number, (start, end) in enumerate(pairwise(ends)):
        if number:
            inner = inner + scene.squared(error)
        error = error - scene.write(z[:, start:end], rows=slice(start, end))
    return error, inner


def forward_batchtopk(scene: Scene) -> Terms:
    """Return the loss of a batch."""
    assert scene.config.k is not None
    active = torch.relu(scene.encode())
    z = topk.largest(scene, active, scene.config.k, batch=True)
    error, inner = _errors(scene, z)
    aux = inner + topk.auxiliary(scene, active, error)
    return Terms(scene.squared(error), scene.zero, aux, (z > 0).sum(0), topk.cut_of(scene, z))


def forward_jumprelu(scene: Scene) -> Terms:
    """Return the loss of a batch."""
    pre = scene.encode()
    z, count = jumprelu.activate(scene, pre)
    error, inner = _errors(scene, z)
    sparsity, aux = jumprelu.penalties(scene, pre, z, count)
    return Terms(scene.squared(error), sparsity, inner + aux, (z > 0).sum(0))
