"""Patch, LowRank and Edit: maps that are not corrections along given directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.errors import SteeringError, VectorError
from trimtab.steering._arithmetic import accumulator, combine, project, round_to
from trimtab.steering._vectors import VectorLike, as_tensor, number
from trimtab.steering.ops import Kernel, Op, Raw


@dataclass(frozen=True, eq=False)
class Patch(Op):
    """Replace rows by rows of another run: `h + weight (s - h)`.

    Args:
        source: s, [d] for every selected row, or [r, d]: row i goes to position `positions[i]`.
        weight: 1 replaces, 0 changes nothing, between them interpolates.
        positions: absolute positions of the rows of `source`; None means 0, 1, ..., r - 1.

    Raises:
        SteeringError: positions that do not match the rows, repeat, or are negative. When it runs: a selected row that
            the source does not have (it is refused, never left unpatched).
    """

    source: VectorLike
    weight: float = 1.0
    positions: Sequence[int] | Tensor | None = field(default=None, kw_only=True)

    vectors: ClassVar[tuple[str, ...]] = ("source",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(weight=number(self.weight, "Patch weight"))
        self._take("source", lambda value, what: as_tensor(value, what, ndim=(1, 2)))
        if self.source.ndim == 1:
            if self.positions is not None:
                raise SteeringError("Patch: positions name the rows of a source [r, d]; this source is one vector [d]")
            return
        rows = self.source.shape[0]
        given = range(rows) if self.positions is None else self.positions
        where = tuple(int(one) for one in (given.tolist() if isinstance(given, Tensor) else given))
        if len(where) != rows or len(set(where)) != rows or min(where) < 0:
            raise SteeringError(
                f"Patch: {rows} source rows need {rows} different positions >= 0; got {list(where)[:8]}"
            )
        self._set(positions=where)

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready: its source rounded to `math`, on `device`."""
        source, weight = self.source.to(device, math), round_to(self.weight, math)
        if source.ndim == 1:
            return Kernel(correct=lambda h, _: Raw((source - h) * weight))
        assert isinstance(self.positions, tuple)
        order = sorted(range(len(self.positions)), key=lambda i: self.positions[i])  # type: ignore[index]
        source = source[torch.tensor(order, device=device)]
        known = torch.tensor(sorted(self.positions), device=device)

        def correct(h: Tensor, positions: Tensor) -> Raw:
            index = torch.searchsorted(known, positions).clamp_(max=len(known) - 1)
            # a row without a source becomes NaN: selected on an accelerator, the check for non-finite results raises
            there = (known[index] == positions)[:, None]
            return Raw(torch.where(there, (source[index] - h) * weight, float("nan")))

        def require(positions: Tensor) -> None:
            missing = positions[~torch.isin(positions, known)]
            if missing.numel():
                have = f"{len(known)} positions from {int(known[0])} to {int(known[-1])}"
                raise SteeringError(f"Patch: no source row for position {int(missing[0])}; the source has {have}")

        return Kernel(correct=correct, require=require)


@dataclass(frozen=True, eq=False)
class LowRank(Op):
    """A low-rank map added to the state: `c = B (A h + b)`.

    Args:
        A: [r, d], read directions.
        b: [r], bias; None for zero.
        B: [d, r], write directions.
    """

    A: VectorLike
    b: VectorLike
    B: VectorLike

    def __post_init__(self) -> None:
        super().__post_init__()
        read = as_tensor(self.A, "LowRank A", ndim=2)
        write = as_tensor(self.B, "LowRank B", ndim=2)
        bias = torch.zeros(read.shape[0]) if self.b is None else as_tensor(self.b, "LowRank b")
        rank, width = read.shape
        if write.shape != (width, rank) or bias.shape != (rank,):
            raise VectorError(
                f"LowRank: A {[rank, width]} needs b {[rank]} and B {[width, rank]}; got b {[*bias.shape]} and "
                f"B {[*write.shape]}"
            )
        self._set(A=read, b=bias, B=write)

    @classmethod
    def loreft(cls, rotation: VectorLike, weight: VectorLike, bias: VectorLike, **options: object) -> LowRank:
        """Return LoReFT's map `h + R^T (W h + b - R h)` (Wu et al., "ReFT", 2024): A = W - R, B = R^T.

        Args:
            rotation: R, [r, d], orthonormal rows.
            weight: W, [r, d].
            bias: b, [r].
            options: `math`, `max_ratio`.
        """
        r = as_tensor(rotation, "LoReFT rotation", ndim=2)
        w = as_tensor(weight, "LoReFT weight", ndim=2)
        if r.shape != w.shape:
            raise VectorError(f"LoReFT: rotation {[*r.shape]} and weight {[*w.shape]} must have one shape [r, d]")
        return cls((w.double() - r.double()).float(), bias, r.T, **options)  # type: ignore[arg-type]

    @property
    def width(self) -> int | None:
        """Width of the states that this op acts on."""
        return int(self.A.shape[1])

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready: its matrices rounded to `math`, on `device`."""
        wide = accumulator(math)
        read = self.A.to(device, math).to(wide)
        write = self.B.T.contiguous().to(device, math).to(wide)
        bias = self.b.to(device, math)
        return Kernel(correct=lambda h, _: Raw(combine(project(h, read) + bias, write)))


@dataclass(frozen=True, eq=False)
class Edit(Op):
    """Any function of the rows, in Python: never saved, never digested, never sent to another process.

    Args:
        fn: [N, D] in the op's math dtype -> [N, D] of any float dtype, the new rows; it must not change its input.
        name: what to call it in doses and messages.

    Raises:
        SteeringError: `fn` cannot be called. When it runs: it returned another shape.
    """

    fn: Callable[[Tensor], Tensor]
    name: str = "Edit"

    serialisable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise SteeringError(f"Edit: a {type(self.fn).__name__} was given where a function of the rows was expected")

    @property
    def kind(self) -> str:
        """Name of the op in doses and messages."""
        return self.name

    def kernel(self, math: torch.dtype, device: torch.device) -> Kernel:
        """Return the op made ready."""

        def correct(h: Tensor, _: Tensor) -> Raw:
            changed = self.fn(h)
            if not isinstance(changed, Tensor) or changed.shape != h.shape:
                shape = [*changed.shape] if isinstance(changed, Tensor) else type(changed).__name__
                raise SteeringError(f"{self.name}: the function returned {shape}; {[*h.shape]} was expected")
            return Raw(changed.to(math) - h)

        return Kernel(correct=correct, rowwise=False)
