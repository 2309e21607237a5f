"""The ops on several directions at once: AblateSubspace and CapSubspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import SteeringError
from trimtab.steering._arithmetic import accumulator, combine, project, round_to
from trimtab.steering._vectors import VectorLike, finite, number, unit
from trimtab.steering.ops import Kernel, Op, Raw

RANK_TOLERANCE = 1e-6
"""Singular values at or under this fraction of the largest count as zero."""
MAX_DIRECTIONS = 8
SWEEPS, MANY_SWEEPS, ILL_CONDITIONED = 64, 256, 50.0
Matrix: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class AblateSubspace(Op):
    """Multiply the component in the span of several directions by `keep`.

    The basis is the left singular vectors of the unit directions (as columns, float64) whose singular value is above
    1e-6 of the largest: a QR of dependent directions would invent others. `rank` says how many they are.

    Args:
        directions: [k, d], or a sequence of k vectors; each is normalised here.
        keep: what is left of the component: 0 removes it, 1 is the identity.
        strict: refuse directions that are linearly dependent instead of ablating the span they do have.

    Raises:
        SteeringError: with `strict`, dependent directions; the message names the closest pair.
    """

    directions: VectorLike
    keep: float
    strict: bool = field(default=False, kw_only=True)
    basis: Tensor = field(init=False, repr=False)
    """[rank, d], float64, orthonormal rows."""

    vectors: ClassVar[tuple[str, ...]] = ("directions",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(keep=number(self.keep, "AblateSubspace keep"), strict=bool(self.strict))
        rows = _rows(self.directions, "AblateSubspace directions")
        left, values, _ = torch.linalg.svd(rows.double().T, full_matrices=False)
        self._set(directions=rows, basis=left[:, values > RANK_TOLERANCE * values[0]].T.contiguous())
        if self.strict and self.rank < len(rows):
            first, second, cosine = _closest(rows)
            raise SteeringError(
                f"AblateSubspace: {len(rows)} directions span only {self.rank} dimensions; closest are {first} and "
                f"{second} with cosine {cosine:.9f}; drop one, or use strict=False"
            )

    @property
    def rank(self) -> int:
        """Dimension of the span that is ablated."""
        return int(self.basis.shape[0])

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready: its basis rounded to `math`, on `device`."""
        basis = self.basis.to(torch.float32).to(device, math).to(accumulator(math))
        keep = round_to(self.keep, math)

        def correct(h: Tensor, _: Tensor) -> Raw:
            p = project(h, basis)
            change = p * keep - p
            return Raw(combine(change, basis), p, change)

        return Kernel(correct=correct, probe=basis)


@dataclass(frozen=True, eq=False)
class CapSubspace(Op):
    """Meet bounds on several projections at once with the smallest change: min |d| with lo <= U (h + d) <= hi.

    The change is `d = U^T lambda`; lambda comes from Hildreth's coordinate ascent on the dual (C. Hildreth, "A
    quadratic programming procedure", 1957): in turn `lambda_i = clamp(q_i, lo_i, hi_i) - q_i` with `q_i = p_i +
    sum_{j != i} G_ij lambda_j`, G = U U^T. The number of sweeps is fixed at construction (64, or 256 when cond(G) >
    50), so nothing depends on the data. What the sweeps leave unmet is in the dose as `violation`. Orthogonal
    directions, and one direction, are exact after one sweep.

    Args:
        directions: [k, d], k <= 8, or a sequence of k vectors; each is normalised here.
        min: one lower bound for all, or one per direction, None for none.
        max: upper bounds, likewise.

    Raises:
        SteeringError: no bound, min above max, or bounds on dependent directions that no state can meet.
    """

    directions: VectorLike
    min: float | Sequence[float | None] | None = None
    max: float | Sequence[float | None] | None = None
    sweeps: int = field(init=False)

    vectors: ClassVar[tuple[str, ...]] = ("directions",)

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = _rows(self.directions, "CapSubspace directions")
        if len(rows) > MAX_DIRECTIONS:
            raise SteeringError(f"CapSubspace takes at most {MAX_DIRECTIONS} directions; {len(rows)} were given")
        low = _bounds(self.min, len(rows), "min")
        high = _bounds(self.max, len(rows), "max")
        if all(bound is None for bound in (*low, *high)):
            raise SteeringError("CapSubspace has no bound: give min, max or both, one number or one per direction")
        for index, (a, b) in enumerate(zip(low, high, strict=True)):
            if a is not None and b is not None and a > b:
                raise SteeringError(f"CapSubspace direction {index}: min={a:g} is above max={b:g}")
        gram = rows.double() @ rows.double().T
        _feasible(gram.numpy(), low, high)
        well = float(torch.linalg.cond(gram)) <= ILL_CONDITIONED
        self._set(directions=rows, min=low, max=high, sweeps=SWEEPS if well else MANY_SWEEPS)

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready: directions, products and bounds rounded to `math`, on `device`."""
        assert isinstance(self.min, tuple)
        assert isinstance(self.max, tuple)
        wide = accumulator(math)
        u = self.directions.to(device, math).to(wide)
        low = [float("-inf") if bound is None else round_to(bound, math) for bound in self.min]
        high = [float("inf") if bound is None else round_to(bound, math) for bound in self.max]
        gram = (u.double() @ u.double().T).to(math).to(wide) if device.type != "mps" else (u @ u.T).to(math).to(wide)
        others = gram.clone().fill_diagonal_(0)
        columns = [others[:, i : i + 1].contiguous() for i in range(len(u))]
        lows = torch.tensor(low, dtype=math, device=device)
        highs = torch.tensor(high, dtype=math, device=device)
        once = bool((others == 0).all())
        sweeps = 1 if once else self.sweeps

        def correct(h: Tensor, _: Tensor) -> Raw:
            p = project(h, u)
            multipliers = _hildreth(p, columns, low, high, sweeps)
            moved = p + combine(multipliers, gram)
            violation = torch.maximum(lows - moved, moved - highs).clamp_(min=0).amax(dim=1, keepdim=True)
            clamped = (multipliers != 0).any(dim=1, keepdim=True)
            return Raw(combine(multipliers, u), p, moved - p, clamped, violation)

        return Kernel(correct=correct, probe=u, rowwise=once)


def _hildreth(p: Tensor, columns: list[Tensor], low: list[float], high: list[float], sweeps: int) -> Tensor:
    """Return lambda [N, K] for projections p [N, K]; every step rounds to the dtype of p."""
    math, wide = p.dtype, accumulator(p.dtype)
    count = p.shape[1]
    held = torch.zeros(count, p.shape[0], dtype=wide, device=p.device)
    steps = list(zip(held.unbind(), p.to(wide).T.contiguous().unbind(), columns, low, high, strict=True))
    for _ in range(sweeps):
        for multiplier, start, column, a, b in steps:
            q = ((held * column).sum(0) + start).to(math)
            multiplier.copy_(q.clamp(a, b) - q)
    return held.T.to(math)


def _rows(given: VectorLike, what: str) -> Tensor:
    if isinstance(given, (list, tuple)):
        if not given:
            raise SteeringError(f"{what}: no direction was given")
        rows = [unit(one, f"{what}[{index}]") for index, one in enumerate(given)]
        widths = sorted({int(row.shape[0]) for row in rows})
        if len(widths) > 1:
            raise SteeringError(f"{what}: widths {', '.join(map(str, widths))} were given; all must be equal")
        return torch.stack(rows)
    return unit(given, what, ndim=2)


def _closest(rows: Tensor) -> tuple[int, int, float]:
    cosine = (rows.double() @ rows.double().T).abs().triu(diagonal=1)
    first, second = divmod(int(cosine.argmax()), len(rows))
    return first, second, float(rows[first].double() @ rows[second].double())


def _bounds(given: float | Sequence[float | None] | None, count: int, what: str) -> tuple[float | None, ...]:
    listed: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(listed) != count:
        raise SteeringError(f"CapSubspace {what}: {len(listed)} bounds were given for {count} directions")
    return tuple(finite(bound, f"CapSubspace {what}[{index}]") for index, bound in enumerate(listed))


def _feasible(gram: Matrix, low: Sequence[float | None], high: Sequence[float | None]) -> None:
    """Refuse bounds that nothing can meet, by a linear program.

    The projections of any state are in the range of G; with E a basis of that range, find y with lo <= E y <= hi.
    """
    from scipy.optimize import linprog  # takes a third of a second to import, and few runs need it

    values, axes = np.linalg.eigh(gram)
    span = axes[:, np.sqrt(np.maximum(values, 0)) > RANK_TOLERANCE * np.sqrt(values[-1])]
    rows, limits = [], []
    for row, a, b in zip(span, low, high, strict=True):
        if b is not None:
            rows.append(row)
            limits.append(b)
        if a is not None:
            rows.append(-row)
            limits.append(-a)
    scale = max(1.0, *(abs(value) for value in limits))
    free = [(None, None)] * span.shape[1]
    done = linprog(np.zeros(span.shape[1]), A_ub=np.array(rows), b_ub=np.array(limits) / scale, bounds=free)
    if done.status == 2:
        upper = np.triu(np.abs(gram), 1)
        first, second = divmod(int(upper.argmax()), len(gram))
        raise SteeringError(
            f"CapSubspace: no state can meet min={list(low)} and max={list(high)} on these directions; the closest are "
            f"{first} and {second} with cosine {gram[first, second]:.6f}; widen their bounds or drop one"
        )
