"""Control directions: what a vector's effect is compared with."""

from __future__ import annotations

import numpy as np
import torch

from trimtab.directions.direction import Direction
from trimtab.steering import SteeringVector


def random_control(vector: Direction | SteeringVector, *, seed: int, orthogonal: bool = False) -> Direction:
    """Return a random direction with the norm of `vector`, uniform on the sphere.

    Args:
        vector: what to match.
        seed: names the control for good (numpy's RandomState stream).
        orthogonal: remove the component along `vector` first, so that the control cannot share its effect.
    """
    target = vector.vector.double()
    drawn = torch.from_numpy(np.random.RandomState(seed).standard_normal(target.shape[0]))
    if orthogonal:
        along = target / target.norm()
        drawn = drawn - (drawn @ along) * along
    scaled = drawn * (vector.norm / drawn.norm())
    kind = "orthogonal" if orthogonal else "random"
    return Direction(
        vector=scaled.float(),
        norm=float(scaled.float().double().norm()),
        source=f"{kind} control, seed {seed}",
        layer=None if vector.site is None else vector.site.layer,
        site=vector.site,
    )


def permuted_control(vector: Direction | SteeringVector, *, seed: int) -> Direction:
    """Return the vector with its components permuted: the same values and norm, another direction."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(vector.vector.shape[0]))
    return Direction(
        vector=vector.vector[order].clone(),
        norm=vector.norm,
        source=f"permuted control, seed {seed}",
        layer=None if vector.site is None else vector.site.layer,
        site=vector.site,
    )
