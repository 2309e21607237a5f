"""From what a caller gives as steering to a `Steering` that fits the model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor

from trimtab.backends import ModelInfo
from trimtab.directions import load_direction
from trimtab.errors import InputError, SiteError, SteeringError
from trimtab.steering import Ablate, Add, Cap, Op, Steering
from trimtab.workflows.config import Math, Steer

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
    return None if steering is None else steering.with_math(cast(Math, math))


def refuse_own_math(given: SteeringInput, instead: str) -> None:
    """Refuse an op_math where each side has its own.

    Raises:
        InputError: `given` asks for other arithmetic than the default.
    """
    if isinstance(given, Steer) and given.op_math != Steer().op_math:
        raise InputError(f"op_math={given.op_math!r} would be ignored here: {instead}")


def describe(steering: Steering | None) -> str:
    """Return a steering in words."""
    return "none" if steering is None else steering.describe()


def _from_words(words: Steer, info: ModelInfo) -> Steering:
    vector, layer = _vector(words, info)
    if layer is None:
        raise SteeringError(f"the vector {words.vector!r} does not say its layer; give one, 0 to {info.num_layers - 1}")
    if not -info.num_layers <= layer < info.num_layers:
        raise SiteError(f"layer {layer} is outside this model, which has layers 0 to {info.num_layers - 1}")
    op: Op
    if words.op == "cap":
        op = Cap(vector, min=words.cap_min, max=words.cap, math=words.op_math)
    elif words.op == "add":
        assert words.add is not None
        op = Add(vector, scale=words.add, math=words.op_math)
    else:
        assert words.keep is not None
        op = Ablate(vector, keep=words.keep, math=words.op_math)
    return Steering({f"layers.{layer % info.num_layers}.{words.point}": [op]}, positions=words.where)


def _vector(words: Steer, info: ModelInfo) -> tuple[Tensor, int | None]:
    ready = words.vector.startswith("testbed:")  # these are tried at other layers than their own, too
    read = load_direction(words.vector, layer=None if ready else words.layer, hidden_size=info.hidden_size)
    return read.vector, words.layer if words.layer is not None else read.layer
