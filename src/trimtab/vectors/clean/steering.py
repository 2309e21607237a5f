"""What a cleaned vector is applied with: depth gain, a limit on |dh| / |h|, an average over decode steps.

The published code had each of them and none acted: the limit was compared with a norm that could not reach it, the
average never got its previous value, and the gain was squared. Here each is a number of the ops that run: the gain is a
factor of the scale, the limit is `max_ratio` on the correction of every token, and the average, which of a constant
vector is `1 - a^(t+1)` at decode step t of its own request, is `Ramp(a)`.
"""

from __future__ import annotations

import math

from trimtab.errors import SteeringError
from trimtab.steering import Add, Constant, Ramp, Steering, SteeringVector
from trimtab.steering.ops import Unit
from trimtab.steering.positions import Positions


def depth_gain(layer: int, num_layers: int) -> float:
    """Return `sqrt(1 - l / L)`: 1 at the first block, small at the last.

    Raises:
        SteeringError: the layer is not one of the model's.
    """
    if not 0 <= layer < num_layers:
        raise SteeringError(f"depth gain: layer {layer} was given; a layer from 0 to {num_layers - 1} was expected")
    return math.sqrt(1.0 - layer / num_layers)


def to_steering(
    vector: SteeringVector | None,
    scale: float,
    *,
    unit: Unit = "token_norm",
    positions: str | Positions = "all",
    num_layers: int | None = None,
    max_ratio: float | None = None,
    ema: float | None = None,
) -> Steering | None:
    """Return the steering that adds a vector at the site it was made at.

    Args:
        vector: None is the unsteered baseline: no steering, for a request that is otherwise the same as the others.
        scale: strength.
        unit: of the strength; "token_norm" adds `scale` of every token's norm.
        positions: rows that are steered.
        num_layers: blocks of the model: multiplies the scale by the depth gain; None: no gain.
        max_ratio: upper bound on |dh| / |h| of every token; None: no limit.
        ema: memory of the average over decode steps, between 0 and 1; None: full strength at once.

    Raises:
        SteeringError: a vector without a site, or (for the depth gain) at a site without a layer.
    """
    if vector is None:
        return None
    if vector.site is None:
        raise SteeringError("the vector does not say at which site it was made; extract it again, or bind it yourself")
    strength = scale
    if num_layers is not None:
        if vector.site.layer is None:
            raise SteeringError(f"depth gain: {vector.site} has no layer")
        strength *= depth_gain(vector.site.layer, num_layers)
    op = Add(vector, strength, unit, max_ratio=max_ratio)
    return Steering({str(vector.site): op}, positions=positions, gain=Constant(1.0) if ema is None else Ramp(ema))
