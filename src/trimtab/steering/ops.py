"""The ops on one direction: Add, Cap, Ablate, SetProjection.

For a row `h`, a unit direction `u` and its projection `p = <h, u>`, every op is a correction

    c = a + (clamp(k p + b, lo, hi) - p) u,   then   c *= min(1, max_ratio |h| / |c|)   when a norm limit is asked for,

and the row becomes `h + gain(position) c`. What rounds to which dtype is in `trimtab.steering._arithmetic`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from trimtab.errors import SteeringError
from trimtab.steering._arithmetic import accumulator, dot, norm, round_to
from trimtab.steering._vectors import VectorLike, as_tensor, finite, nonzero, number, unit

Math: TypeAlias = Literal["float32", "bfloat16", "float16", "model"]
Unit: TypeAlias = Literal["absolute", "token_norm", "median_norm"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Raw(NamedTuple):
    """What a kernel computed for N rows, in the op's math dtype."""

    correction: Tensor
    """[N, D], before the norm limit and the gain."""
    projection: Tensor | None = None
    """[N, K]: <h, u> as the op saw it."""
    adjustment: Tensor | None = None
    """[N, K]: clamp(k p + b) - p."""
    clamped: Tensor | None = None
    """bool [N, 1]: whether a bound was active, where that is more than a nonzero adjustment."""
    violation: Tensor | None = None
    """[N, 1]: how far the worst bound is still missed (CapSubspace)."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An op made ready for one dtype and device."""

    correct: Callable[[Tensor, Tensor], Raw]
    """(rows [N, D] in the math dtype, absolute positions [N]) -> Raw."""
    probe: Tensor | None = None
    """Directions [K, D] in the accumulator's dtype, along which the dose is measured."""
    static: Tensor | None = None
    """[D]: the correction, when it is the same for every row."""
    clamps: bool = False
    """Whether a nonzero adjustment means that a bound was active."""
    require: Callable[[Tensor], None] | None = None
    """Given the selected positions, raises when the op cannot act on one of them (looked at on the CPU only)."""
    rowwise: bool = True
    """Whether it may be given the rows in blocks; False where that changes a row, or costs more than it saves."""


@dataclass(frozen=True, eq=False)
class Op:
    """A pure map on hidden states; subclasses state their normal form.

    Args:
        math: dtype that every dot, clamp, subtraction and multiplication of the op rounds to; dots accumulate in
            float32. "model" is the dtype of the model it runs in.
        max_ratio: upper bound on |c| / |h|, or None for no limit.
    """

    math: Math = field(default="float32", kw_only=True)
    max_ratio: float | None = field(default=None, kw_only=True)
    origin: str | None = field(default=None, init=False, repr=False)
    """The site that its vector was made at, when the vector says so."""

    serialisable: ClassVar[bool] = True
    vectors: ClassVar[tuple[str, ...]] = ()
    """Fields whose last dimension is the width of the states."""

    def __post_init__(self) -> None:
        if self.math not in get_args(Math):
            raise SteeringError(f"{self.kind} math={self.math!r}: expected one of {', '.join(get_args(Math))}")
        limit = finite(self.max_ratio, f"{self.kind} max_ratio")
        if limit is not None and limit <= 0:
            raise SteeringError(f"{self.kind} max_ratio={limit:g}: a limit on |c| / |h| is above 0")
        self._set(max_ratio=limit)

    @property
    def kind(self) -> str:
        """Name of the op in files, doses and messages."""
        return type(self).__name__

    @property
    def width(self) -> int | None:
        """Width of the states that this op acts on; None when it takes any."""
        return next((int(getattr(self, name).shape[-1]) for name in self.vectors), None)

    def describe(self) -> str:
        """Return the op in words: its kind and its settings, vectors left out."""
        parts = []
        for one in fields(self):
            value = getattr(self, one.name)
            if one.init and one.name != "math" and value is not None and not isinstance(value, Tensor):
                parts.append(f"{one.name}={value:g}" if isinstance(value, float) else f"{one.name}={value}")
        return f"{self.kind}({', '.join([*parts, self.math])})"

    def math_dtype(self, model: torch.dtype) -> torch.dtype:
        """Return the dtype of this op's arithmetic in a model of dtype `model`."""
        return _DTYPES.get(self.math, model)

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready: its vectors rounded to `math`, on `device`."""
        raise NotImplementedError

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _take(self, name: str, convert: Callable[[VectorLike, str], Tensor]) -> None:
        given = getattr(self, name)
        site = getattr(given, "site", None)
        self._set(**{name: convert(given, f"{self.kind} {name}")}, origin=None if site is None else str(site))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = [(getattr(self, one.name), getattr(other, one.name)) for one in fields(self) if one.init]
        return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)

    def __hash__(self) -> int:
        return hash((self.kind, self.math, self.width))


@dataclass(frozen=True, eq=False)
class Add(Op):
    """Add a vector: `a = scale * v`.

    Args:
        vector: v, [d]; a tensor, array, list, SteeringVector or Direction.
        scale: strength, in the unit below; negative steers away, 0 changes nothing.
        unit: "absolute": v as given, in hidden units; "token_norm": `scale |h| v/|v|`; "median_norm":
            `scale m v/|v|`, m the median norm of the states at the site.
        median_norm: m, for that unit; taken from a SteeringVector that was calibrated.

    Raises:
        VectorError: v is not finite, zero, or not one-dimensional.
        SteeringError: an unknown unit, or "median_norm" without m.
    """

    vector: VectorLike
    scale: float = 1.0
    unit: Unit = "absolute"
    median_norm: float | None = field(default=None, kw_only=True)

    vectors: ClassVar[tuple[str, ...]] = ("vector",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in get_args(Unit):
            raise SteeringError(f"Add unit={self.unit!r}: expected one of {', '.join(get_args(Unit))}")
        median = self.median_norm if self.median_norm is not None else getattr(self.vector, "median_norm", None)
        median = finite(median, "Add median_norm") if self.unit == "median_norm" else None
        if self.unit == "median_norm" and (median is None or median <= 0):
            raise SteeringError(
                f"Add unit='median_norm' needs the median norm at its site and got {median}: calibrate the vector "
                "(trimtab.directions.calibrate) or give median_norm="
            )
        self._set(scale=number(self.scale, "Add scale"), median_norm=median)
        self._take("vector", lambda value, what: nonzero(as_tensor(value, what), what))

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready: its vectors rounded to `math`, on `device`."""
        wide = self.vector.double()
        direction = (wide / wide.norm()).to(torch.float32)
        probe = direction.to(math).to(device, accumulator(math))[None]
        if self.unit == "token_norm":
            u, scale = direction.to(device, math), round_to(self.scale, math)
            return Kernel(correct=lambda h, _: Raw(norm(h) * scale * u), probe=probe)
        if self.unit == "median_norm":
            assert self.median_norm is not None
            wide = wide / wide.norm() * self.median_norm
        static = (wide * self.scale).to(torch.float32).to(device, math)
        return Kernel(correct=lambda h, _: Raw(static.expand_as(h)), probe=probe, static=static)


@dataclass(frozen=True, eq=False)
class Cap(Op):
    """Clamp the projection into [min, max] and leave the rest of the row alone: k = 1, b = 0.

    Args:
        direction: [d]; normalised here, and the norm it had is logged.
        min: lower bound on <h, u>, in hidden units, signed; None for no bound.
        max: upper bound.

    Raises:
        VectorError: the direction is not finite, zero, or not one-dimensional; a bound is not finite.
        SteeringError: no bound, or min above max.
    """

    direction: VectorLike
    min: float | None = None
    max: float | None = None

    vectors: ClassVar[tuple[str, ...]] = ("direction",)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = finite(self.min, "Cap min"), finite(self.max, "Cap max")
        if low is None and high is None:
            raise SteeringError("Cap has no bound: give min, max or both, in hidden units along the unit direction")
        if low is not None and high is not None and low > high:
            raise SteeringError(f"Cap min={low:g} is above max={high:g}; no projection satisfies both")
        self._set(min=low, max=high)
        self._take("direction", unit)

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready: its direction and bounds rounded to `math`, on `device`."""
        low = None if self.min is None else round_to(self.min, math)
        high = None if self.max is None else round_to(self.max, math)

        def target(p: Tensor) -> Tensor:
            return p.clamp(low, high)

        return _along(self.direction, target, math, device, clamps=True)


@dataclass(frozen=True, eq=False)
class Ablate(Op):
    """Multiply the component along a direction by `keep`: k = keep, b = 0.

    Args:
        direction: [d]; normalised here.
        keep: what is left of the component: 0 removes it, 1 is the identity; it has no default because the
            literature uses both conventions.
    """

    direction: VectorLike
    keep: float

    vectors: ClassVar[tuple[str, ...]] = ("direction",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(keep=number(self.keep, "Ablate keep"))
        self._take("direction", unit)

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready: its direction rounded to `math`, on `device`."""
        keep = round_to(self.keep, math)
        return _along(self.direction, lambda p: p * keep, math, device)


@dataclass(frozen=True, eq=False)
class SetProjection(Op):
    """Set the projection to a value: k = 0, b = value.

    Args:
        direction: [d]; normalised here.
        value: what <h, u> becomes, in hidden units.
    """

    direction: VectorLike
    value: float

    vectors: ClassVar[tuple[str, ...]] = ("direction",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(value=number(self.value, "SetProjection value"))
        self._take("direction", unit)

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready: its direction rounded to `math`, on `device`."""
        value = round_to(self.value, math)
        return _along(self.direction, lambda p: torch.full_like(p, value), math, device)


def _along(
    direction: Tensor,
    target: Callable[[Tensor], Tensor],
    math: torch.dtype,
    device: torch.device,
    *,
    clamps: bool = False,
) -> Kernel:
    """Return the kernel of `c = (target(p) - p) u`."""
    u = direction.to(device, math)
    probe = u.to(accumulator(math))

    def correct(h: Tensor, _: Tensor) -> Raw:
        p = dot(h, probe)
        change = target(p) - p
        return Raw(change * u, p, change)

    return Kernel(correct=correct, probe=probe[None], clamps=clamps)
