"""From what a caller gives as steering to a `Steering` that fits the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trimtab import testbed
from trimtab.backends import ModelInfo
from trimtab.directions import load_direction
from trimtab.errors import InputError, SteeringError
from trimtab.steering import Ablate, Add, Cap, Op, Steering
from trimtab.workflows.config import Steer

SteeringInput = Steering | Steer | str | Path | None


def build_steering(given: SteeringInput, info: ModelInfo) -> Steering | None:
    """Return the steering that `given` stands for.

    Args:
        given: a `Steering`, a `Steer`, the path of a steering file, or None.
        info: the model it must fit.

    Raises:
        InputError: something else.
        VectorError: the vector does not fit the model.
    """
    if given is None or isinstance(given, Steering):
        return given
    if isinstance(given, Steer):
        return _from_words(given, info) if given.op else None
    if isinstance(given, (str, Path)):
        return Steering.load(given)
    raise InputError(f"steering is a Steering, a Steer or the path of a steering file, not {type(given).__name__}")


def with_math(steering: Steering | None, math: str) -> Steering | None:
    """Return the same steering with every op's arithmetic in `math`."""
    if steering is None:
        return None
    return replace(steering, bound=tuple(replace(one, op=replace(one.op, math=math)) for one in steering.bound))


def describe(steering: Steering | None) -> str:
    """Return a steering in words."""
    return "none" if steering is None else steering.describe()


def _from_words(words: Steer, info: ModelInfo) -> Steering:
    source = words.vector
    if source.startswith("testbed:"):
        source = str(testbed.direction(source.removeprefix("testbed:")))
    layer = words.layer
    direction = load_direction(source, layer=layer, hidden_size=info.hidden_size)
    layer = direction.layer if layer is None else layer
    if layer is None:
        raise SteeringError(f"the vector {words.vector!r} does not say its layer; give one, 0 to {info.num_layers - 1}")
    op: Op
    if words.op == "cap":
        op = Cap(direction.vector, min=words.cap_min, max=words.cap, math=words.op_math)
    elif words.op == "add":
        assert words.add is not None
        op = Add(direction.vector, scale=words.add, math=words.op_math)
    else:
        assert words.keep is not None
        op = Ablate(direction.vector, keep=words.keep, math=words.op_math)
    return Steering({f"layers.{layer}.{words.point}": [op]}, positions=words.where)
