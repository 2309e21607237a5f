"""How strongly an op acts at each row: a pure function of the row's position.

`t = max(position - P, 0)` is the decode step of a row, P the prompt length: the first generated token is t = 0, and the
rows of the prompt count as t = 0 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from trimtab.errors import SteeringError
from trimtab.steering._vectors import number


@dataclass(frozen=True, slots=True)
class Constant:
    """The same gain at every row.

    Args:
        value: the gain; 1 leaves the correction as the op computed it, 0 switches it off.
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", number(self.value, "gain"))

    def at(self, step: Tensor) -> Tensor:
        """Return the gain at decode steps `step` [N], float32."""
        return torch.full(step.shape, self.value, dtype=torch.float32, device=step.device)


@dataclass(frozen=True, slots=True)
class Ramp:
    """`1 - a^(t+1)`: what an exponential moving average of a constant vector over decode steps is.

    Args:
        a: the memory of the average, 0 < a < 1; the gain rises from 1 - a to 1.
    """

    a: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", _fraction(self.a, "Ramp a"))

    def at(self, step: Tensor) -> Tensor:
        """Return the gain at decode steps `step` [N], float32."""
        return (1.0 - torch.pow(self.a, _wide(step) + 1)).to(torch.float32)


@dataclass(frozen=True, slots=True)
class Decay:
    """`a^t`: full strength at the first generated token, then a fixed fraction less at every step.

    Args:
        a: the factor per decode step, 0 < a < 1.
    """

    a: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", _fraction(self.a, "Decay a"))

    def at(self, step: Tensor) -> Tensor:
        """Return the gain at decode steps `step` [N], float32."""
        return torch.pow(self.a, _wide(step)).to(torch.float32)


Gain: TypeAlias = Constant | Ramp | Decay
KINDS: dict[str, type[Constant] | type[Ramp] | type[Decay]] = {"Constant": Constant, "Ramp": Ramp, "Decay": Decay}


def as_gain(value: Gain | float) -> Gain:
    """Return a number as a constant gain, a gain as it is.

    Raises:
        SteeringError: neither.
    """
    return value if isinstance(value, (Constant, Ramp, Decay)) else Constant(value)


def _wide(step: Tensor) -> Tensor:
    return step.to(torch.float32 if step.device.type == "mps" else torch.float64)


def _fraction(value: float, what: str) -> float:
    result = number(value, what)
    if not 0 < result < 1:
        raise SteeringError(f"{what}: {result:g} was given; a number between 0 and 1, both excluded, was expected")
    return result
