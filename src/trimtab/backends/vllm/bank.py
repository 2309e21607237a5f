"""Banks of steering programs: fixed buffers per site, from which each row of a step takes the program of its binding.

Slot 0 is always empty. A slot holds up to `ops_per_site` ops in order; an op holds its kind, the key of its gains, its
dtypes, a few numbers, its directions and, for bounds on several directions, their products. Numbers are packed as they
are in the op's math dtype. All of a slot lies together: what a row reads has left the cache since the pass before, and
one piece of memory comes back sooner than four. The ops come down to four kinds:

    STATIC   c = v                                               Add, absolute and median_norm
    NORM     c = factor |h| u                                    Add, token_norm
    LINEAR   c = sum_k (clamp(factor p_k, lo_k, hi_k) - p_k) u_k  Cap, Ablate, SetProjection, AblateSubspace
    BOUNDS   c = sum_k lambda_k u_k, lambda by Hildreth's sweeps  CapSubspace
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.backends.vllm.kernels import BOUNDS, LINEAR, NORM, STATIC, Native, Tables, native, steer, update
from trimtab.errors import SteeringError, VectorError
from trimtab.sites import Site
from trimtab.steering import Ablate, AblateSubspace, Add, Cap, CapSubspace, Op, SetProjection
from trimtab.steering.program import SiteProgram
from trimtab.steering.subspace import MANY_SWEEPS

SUPPORTED = (Add, Cap, Ablate, SetProjection, AblateSubspace, CapSubspace)
MOST_DIRECTIONS = 64
_META = 8  # numbers of an op that say what it is
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass
class StepRows:
    """The rows of one step. Buffers are filled in place before each step and never replaced.

    Rows from `n` on are padding; on an accelerator they pass through the kernel too and must have binding 0.
    """

    n: int
    binding: Tensor
    """int32 [max_tokens]: 0 for an untracked row."""
    slot_of: Tensor
    """int32 [max_bindings + 1]: 0 for a request that is not steered."""
    gain: Tensor
    """float32 [max_tokens, keys]; NaN where the row is not selected."""


class _Packed(NamedTuple):
    """One op, ready to be copied into a slot."""

    meta: list[int]
    param: list[float]
    directions: Tensor
    bounds: Tensor | None


class SiteBank:
    """The programs that can act at one site.

    Args:
        site: the site, for messages.
        width: W, width of its states.
        max_steering: slots, numbered from 1.
        ops_per_site: J, ops of one slot.
        max_directions: directions of one slot; each op may have `max_directions // ops_per_site` of them.
        max_bound: bindings, numbered from 1.
        device: where the states are.
        model_dtype: their dtype: float32, bfloat16 or float16.
        storage: dtype of the stored directions: float32, or bfloat16 for half the memory and rounded directions.
        kernel: "torch" uses the torch operations on the CPU too.
        counts: int32 [max_bound + 1, J, 3] to count in, zeros; None makes it.
    """

    def __init__(
        self,
        site: Site,
        width: int,
        *,
        max_steering: int,
        ops_per_site: int,
        max_directions: int,
        max_bound: int,
        device: torch.device | str,
        model_dtype: torch.dtype,
        storage: torch.dtype = torch.float32,
        kernel: Literal["auto", "torch"] = "auto",
        counts: Tensor | None = None,
    ) -> None:
        if model_dtype not in _CODES or storage not in (torch.float32, torch.bfloat16):
            raise SteeringError(
                f"{site}: states in {model_dtype} with directions stored in {storage} were given; states in float32, "
                "bfloat16 or float16 and directions in float32 or bfloat16 were expected"
            )
        self.site, self.width, self.ops, self.model_dtype = site, width, ops_per_site, model_dtype
        self.each = min(max(1, max_directions // ops_per_site), MOST_DIRECTIONS)
        if counts is None:
            counts = torch.zeros(max_bound + 1, ops_per_site, 3, dtype=torch.int32, device=device)
        self._storage = storage
        self._memory, slots = self._slots(max_steering + 1, device)
        self.tables = Tables(*slots, counts)
        self.counts = self.tables.counts
        """int32 [max_bound + 1, J, 3], per binding and op: rows that it selected; rows of them where a bound was
        active; rows of them that the ops of the site would have made non-finite, and that were held in the range."""
        self._sweeps: dict[int, int] = {}  # slots that hold ops; the most sweeps of one of them
        self._graphs = self.counts.device.type != "cpu"
        self._kernel = native() if kernel == "auto" and not self._graphs else None
        self._bound: _Bound | None = None
        self._lasting: list[_Bound] = []

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return self._memory.nbytes + self.counts.nbytes

    @property
    def record(self) -> int:
        """Bytes of a slot."""
        return self._memory.shape[1]

    @staticmethod
    def supports(op: Op) -> bool:
        """Return whether an op can lie in a bank."""
        return isinstance(op, SUPPORTED)

    def _slots(self, slots: int, device: torch.device | str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return room for slots, zeros, and its tables; a slot lies together: a row reads one piece of memory."""
        ops, each = self.ops, self.each
        kinds = (torch.int32, torch.float32, torch.float32, self._storage)
        shapes = ((ops, _META), (ops, 4), (ops, each, 2 + each), (ops, each, self.width))
        sizes = [prod(shape) * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True)]
        head = _whole_lines(sum(sizes[:3]))
        starts = [0, sizes[0], sizes[0] + sizes[1], head]
        memory = torch.zeros(slots, head + _whole_lines(sizes[3]), dtype=torch.uint8, device=device)
        meta, param, bounds, directions = (
            memory[:, start : start + size].view(kind).view(slots, *shape)
            for start, size, kind, shape in zip(starts, sizes, kinds, shapes, strict=True)
        )
        return memory, (meta, param, directions, bounds)

    def check(self, program: SiteProgram) -> None:
        """Refuse a program that does not fit.

        Raises:
            SteeringError: too many ops or directions, or an op that cannot lie in a bank.
            VectorError: vectors of another width.
        """
        if len(program.steps) > self.ops:
            raise SteeringError(
                f"{self.site}: {len(program.steps)} ops were given and the engine holds {self.ops} per site; start it "
                f"with ops_per_site={len(program.steps)}"
            )
        for step in program.steps:
            if not self.supports(step.op):
                kinds = ", ".join(one.__name__ for one in SUPPORTED)
                raise SteeringError(f"{self.site}: {step.name} cannot lie in a bank, which takes {kinds}")
            if step.op.width != self.width:
                raise VectorError(
                    f"{self.site}: {step.name} has vectors of width {step.op.width}; the states are {self.width} wide"
                )
            count = _count(step.op)
            if count > self.each:
                raise SteeringError(
                    f"{self.site}: {step.name} has {count} directions and the engine holds {self.each} per op; start "
                    f"it with directions_per_op={count} (at most {MOST_DIRECTIONS})"
                )

    def pack(self, program: SiteProgram, keys: Mapping[str, int]) -> Tensor:
        """Return a program as a slot holds it: uint8 [record], on the host.

        Args:
            program: the ops of this site.
            keys: column of `StepRows.gain` of each `step.key`.

        Raises:
            SteeringError: it does not fit.
            VectorError: vectors of another width.
        """
        self.check(program)
        maths = [step.op.math_dtype(self.model_dtype) for step in program.steps]
        wide = maths[0]
        for math in maths[1:]:
            wide = torch.promote_types(wide, math)
        memory, (meta, param, directions, bounds) = self._slots(1, "cpu")
        for j, (step, math) in enumerate(zip(program.steps, maths, strict=True)):
            one = _pack(step.op, keys[step.key], math, _CODES[wide], self._storage)
            count = len(one.directions)
            directions[0, j, :count].copy_(one.directions)
            if one.bounds is not None:
                bounds[0, j, :count, : one.bounds.shape[1]].copy_(one.bounds)
            param[0, j].copy_(torch.tensor(one.param))
            meta[0, j].copy_(torch.tensor(one.meta, dtype=torch.int32))
        return memory[0]

    def put(self, slot: int, packed: Tensor) -> None:
        """Have a slot, from 1, hold what `pack` made, in place of what it held."""
        self._memory[slot].copy_(packed)
        meta = packed.numpy()[: self.ops * _META * 4].view(np.int32).reshape(-1, _META)
        self._sweeps[slot] = int(meta[:, 5].max())

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if self._sweeps.pop(slot, None) is not None:
            self.tables.meta[slot].zero_()

    def handles(self, rows: StepRows, residual: Tensor | None, dose: Tensor) -> tuple[int, ...]:
        """Return the kernel's numbers of this bank over fixed buffers, without and with full doses; () for torch."""
        if self._kernel is not None:
            self._lasting = [_Bound(self._kernel, self.tables, rows, residual, one) for one in (None, dose)]
        return tuple(one.handle for one in self._lasting)

    def apply_(self, x: Tensor, residual: Tensor | None, rows: StepRows, dose: Tensor | None = None) -> None:
        """Apply to each row the program of its binding, in place.

        The state is `residual + x` in float32, or x; the sum of the corrections is rounded once into x. Rows that
        nothing selects and elements whose correction is 0 keep their bits. An element that the correction would take
        out of the range of the dtype (of x, or of the state) is held at its edge; one that it would make NaN is left.

        Args:
            x: [N, W] in the model's dtype; rows may be further apart than W.
            residual: [at least N, W] in the model's dtype, or None.
            rows: whose rows these are.
            dose: float32 [at least N, J, 5], filled for the rows that an op selects: p_before, p_after, cap_delta,
                clamped, |c| / |h|.
        """
        if not (self._sweeps or self._graphs):
            return
        if self._kernel is not None:
            bound = self._bound
            if bound is None or bound.rows is not rows or bound.residual is not residual or bound.dose is not dose:
                bound = self._bound = _Bound(self._kernel, self.tables, rows, residual, dose)
            self._kernel.apply_(x, bound.handle, rows.n)
            return
        n = x.shape[0] if self._graphs else min(rows.n, x.shape[0])
        several = 0 if self.each == 1 else MANY_SWEEPS if self._graphs else max(self._sweeps.values())
        steer(
            self.tables,
            x[:n],
            None if residual is None else residual[:n],
            None if dose is None else dose[:n],
            rows.binding[:n],
            rows.slot_of,
            rows.gain[:n],
            several,
        )


class _Bound:
    """The buffers of a call, checked and known to the kernel by one number; they are the same at every step."""

    def __init__(
        self, kernel: Native, tables: Tables, rows: StepRows, residual: Tensor | None, dose: Tensor | None
    ) -> None:
        self.rows, self.residual, self.dose = rows, residual, dose
        buffers = [*tables, rows.binding, rows.slot_of, rows.gain]
        self.handle: int = kernel.bind(buffers, residual, dose)
        weakref.finalize(self, kernel.release, self.handle)


def update_residual_(r: Tensor, x: Tensor, rows: StepRows, mode: Literal["set", "add"]) -> None:
    """Bring the residual stream of tracked rows up to date: r := x, or r := round(r + x).

    Args:
        r: [at least N, W] in the model's dtype.
        x: [N, W] in the model's dtype.
        rows: whose rows these are; rows with binding 0 are left alone.
        mode: "set" or "add".
    """
    if r.device.type == "cpu" and (kernel := native()) is not None:
        kernel.update_(r, x, rows.binding, rows.n, mode == "add")
        return
    n = x.shape[0] if r.device.type != "cpu" else min(rows.n, x.shape[0])
    update(r[:n], x[:n], rows.binding[:n], mode == "add")


def _whole_lines(size: int) -> int:
    """Return a number of bytes made up to whole cache lines."""
    return -(-size // 64) * 64


def _count(op: Op) -> int:
    if isinstance(op, AblateSubspace):
        return op.rank
    return int(op.directions.shape[0]) if isinstance(op, CapSubspace) else 1


def _pack(op: Op, key: int, math: torch.dtype, state: int, storage: torch.dtype) -> _Packed:
    """Return an op as the numbers of its place: all rounded to `math`."""

    def rounded(values: Any) -> Any:
        return torch.tensor(values, dtype=torch.float64).to(math).float().tolist()

    kernel = op.kernel(math, torch.device("cpu"))
    assert kernel.probe is not None
    u = kernel.probe.to(storage).float()
    kind, factor, inverse, sweeps, clamps, limits = LINEAR, 1.0, 1.0, 1, False, [(-inf, inf)] * len(u)
    gram = torch.zeros(len(u), len(u))
    if isinstance(op, Add):
        if kernel.static is not None and op.scale != 0:
            kind, u = STATIC, kernel.static.float().to(storage).float()[None]
            inverse = float((1.0 if op.scale > 0 else -1.0) / u.double().norm())
        else:
            kind, factor = NORM, op.scale
    elif isinstance(op, Cap):
        clamps, limits = True, [(_or(op.min, -inf), _or(op.max, inf))]
    elif isinstance(op, SetProjection):
        limits = [(op.value, op.value)]
    elif isinstance(op, (Ablate, AblateSubspace)):
        factor = op.keep
    elif isinstance(op, CapSubspace):
        assert isinstance(op.min, tuple)
        assert isinstance(op.max, tuple)
        clamps, limits = True, [(_or(low, -inf), _or(high, inf)) for low, high in zip(op.min, op.max, strict=True)]
        gram = (u.double() @ u.double().T).to(math).float()
        once = bool((gram.clone().fill_diagonal_(0) == 0).all())
        kind, sweeps = BOUNDS, 1 if once else op.sweeps
    meta = [kind, key, len(u), _CODES[math], state, sweeps if kind == BOUNDS else 0, int(clamps), 0]
    ratio = inf if op.max_ratio is None else op.max_ratio
    param = [rounded(factor), inverse, rounded(ratio), 0.0]
    return _Packed(meta, param, u, torch.cat([torch.tensor(rounded(limits)).reshape(-1, 2), gram], 1))


def _or(bound: float | None, default: float) -> float:
    return default if bound is None else bound
