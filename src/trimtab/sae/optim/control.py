"""A target L0: the sparsity coefficient follows how far the mean number of active latents is from it."""

from __future__ import annotations

import math

_INTEGRAL = 0.03
_BELOW = 40.0
_FAR = 2.0
_LIMIT = 16.0


class SparsityControl:
    """A controller of the sparsity coefficient by e = log(L0 / target).

    The coefficient is multiplied by exp(i + e) where there are too many active latents, i the integral of e, and by
    exp(i) (1 + 40 e) where there are too few: 2.5 % under the target the penalty has gone. Below that it turns into a
    reward as large as exp(i) where `signed`, as a quadratic penalty on L0 would: thresholds that have risen too far
    come down again. Nothing but L0 enters, so a scaled run is controlled exactly as the unscaled one.

    Args:
        target: mean number of active latents per token.
        signed: let the penalty become a reward.
    """

    def __init__(self, target: float, *, signed: bool) -> None:
        self.target = target
        self.least = -1.0 if signed else 0.0
        self.integral = 0.0
        self.error = 0.0

    @property
    def factor(self) -> float:
        """What the coefficient is multiplied by."""
        level = math.exp(self.integral)
        if self.error >= 0:
            return level * math.exp(self.error)
        return level * max(self.least, 1 + _BELOW * self.error)

    def observe(self, l0: float) -> None:
        """Take the L0 of a step into account; one that is not finite changes nothing."""
        if not math.isfinite(l0):
            return
        self.error = max(-_FAR, min(_FAR, math.log(max(l0, 1e-3) / self.target)))
        self.integral = max(-_LIMIT, min(_LIMIT, self.integral + _INTEGRAL * self.error))
