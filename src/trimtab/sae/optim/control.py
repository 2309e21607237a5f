"""A target L0: the sparsity coefficient follows how far the mean number of active latents is from it."""

from __future__ import annotations

import math

_PROPORTIONAL = 1.0
_INTEGRAL = 0.02
_FAR = 2.0
_LIMIT = 16.0


class SparsityControl:
    """A proportional-integral controller of log lambda by log(L0 / target).

    Nothing but L0 enters, so a scaled run is controlled exactly as the unscaled one.

    Args:
        target: mean number of active latents per token.
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self.integral = 0.0
        self.error = 0.0

    @property
    def factor(self) -> float:
        """What the coefficient is multiplied by."""
        return math.exp(max(-_LIMIT, min(_LIMIT, self.integral + _PROPORTIONAL * self.error)))

    def observe(self, l0: float) -> None:
        """Take the L0 of a step into account; one that is not finite changes nothing."""
        if not math.isfinite(l0):
            return
        self.error = max(-_FAR, min(_FAR, math.log(max(l0, 1e-3) / self.target)))
        self.integral = max(-_LIMIT, min(_LIMIT, self.integral + _INTEGRAL * self.error))
