"""Direction: what every reader of vectors returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.sites import Site
from trimtab.steering import SteeringVector


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """A vector and what its file says about it.

    Args:
        vector: float32 [d], as the file has it, in hidden units.
        norm: |vector|, in float64.
        source: the file or the words it came from.
        layer: 0-based layer whose output it belongs to, when the file says so.
        site: site it was made at, when the file says so.
        calibrated: the SteeringVector that the file holds, with quantiles and median norm.
    """

    vector: Tensor
    norm: float
    source: str
    layer: int | None = None
    site: Site | None = None
    calibrated: SteeringVector | None = None

    @property
    def unit(self) -> Tensor:
        """The unit direction, float32 [d], divided in float64."""
        scaled: Tensor = self.vector.double() / self.norm
        return scaled.float()

    @property
    def median_norm(self) -> float | None:
        """Median norm at its site, when it was calibrated."""
        return None if self.calibrated is None else self.calibrated.median_norm
