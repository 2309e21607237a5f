"""Vectors that enter an op: converted to float32, checked, and normalised in float64."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from trimtab._base.log import get_logger
from trimtab.errors import SteeringError, VectorError

VectorLike: TypeAlias = Any
"""A tensor, an array, a list of numbers, or an object with a `vector` attribute (SteeringVector, Direction)."""

UNIT_TOLERANCE = 2.0**-23  # a unit vector rounded to float32 has a norm within 2^-24 of 1: normalising is idempotent
_log = get_logger(__name__)


def as_tensor(value: VectorLike, what: str, *, ndim: int | tuple[int, ...] = 1) -> Tensor:
    """Return `value` as a contiguous float32 CPU tensor of its own.

    Raises:
        VectorError: not numbers, the wrong number of dimensions, empty, or not finite in float32.
    """
    given = getattr(value, "vector", value)
    try:
        tensor = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise VectorError(f"{what}: a {type(value).__name__} is not a vector; give a tensor of numbers") from error
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if tensor.ndim not in allowed or tensor.numel() == 0:
        shapes = " or ".join("[" + ", ".join(("rows", "d")[-n:]) + "]" if n else "[]" for n in allowed)
        raise VectorError(f"{what}: shape {list(tensor.shape)} was given; {shapes} was expected")
    if tensor.is_complex() or tensor.dtype is torch.bool:
        raise VectorError(f"{what}: dtype {tensor.dtype} was given; real numbers were expected")
    result = tensor.detach().to(device="cpu", dtype=torch.float32).clone(memory_format=torch.contiguous_format)
    finite = torch.isfinite(result)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        first = (~finite).nonzero()[0].tolist()
        raise VectorError(
            f"{what}: {bad} of {result.numel()} values are not finite in float32, the first at {first}; "
            "train or export the vector again"
        )
    return result


def nonzero(tensor: Tensor, what: str) -> Tensor:
    """Return `tensor` of which no row is zero.

    Raises:
        VectorError: a row is zero.
    """
    norms = tensor.double().reshape(-1, tensor.shape[-1]).norm(dim=-1)
    if bool((norms == 0).any()):
        row = "" if tensor.ndim == 1 else f" row {int((norms == 0).nonzero()[0])}"
        raise VectorError(f"{what}:{row} the vector of width {tensor.shape[-1]} is zero and has no direction")
    return tensor


def unit(value: VectorLike, what: str, *, ndim: int = 1) -> Tensor:
    """Return the direction(s) of `value`: float32 rows of norm 1, divided in float64.

    A norm other than 1 is logged: bounds are in hidden units along the unit direction, whatever the norm was.
    """
    tensor = nonzero(as_tensor(value, what, ndim=ndim), what)
    wide = tensor.double()
    norms = wide.norm(dim=-1, keepdim=True)
    off = (norms - 1).abs() > UNIT_TOLERANCE
    if not bool(off.any()):
        return tensor
    text = ", ".join(f"{norm:.6g}" for norm in norms.flatten().tolist())
    _log.info("%s: normalised to unit length; the norm given was %s", what, text)
    return torch.where(off, wide / norms, wide).to(torch.float32)


def number(value: float, what: str) -> float:
    """Return `value` as a float.

    Raises:
        SteeringError: not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise SteeringError(f"{what}: {value!r} was given; a number was expected")
    result = float(value)
    if not np.isfinite(result):
        raise SteeringError(f"{what}: {result} was given; a finite number was expected")
    return result


def finite(value: float | None, what: str) -> float | None:
    """Return `number(value)`, or None for None."""
    return None if value is None else number(value, what)
