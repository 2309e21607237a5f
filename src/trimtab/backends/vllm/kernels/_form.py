"""steer.cpp as torch operations of fixed shapes: for accelerators, and where nothing can be compiled.

Every row runs every op of its site; what does not apply to it is left out by `where`. Nothing depends on the data and
nothing waits for the device, so calls may be captured in CUDA graphs. Numbers are float32 that hold values rounded to
the dtype of the rounding law. A dot is summed by halves: one fixed order per width, whatever the number of rows, and
the order of steer.cpp, so that both agree to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATIC, NORM, LINEAR, BOUNDS = 1, 2, 3, 4
BFLOAT16, FLOAT16 = 1, 2


class Tables(NamedTuple):
    """The buffers of a bank; S slots, J ops per slot, K directions per op, W the width."""

    meta: Tensor
    """int32 [S, J, 8]: kind, key, directions, math, state, sweeps, clamps, unused."""
    param: Tensor
    """float32 [S, J, 4]: factor, 1 / norm of the probe, max_ratio, unused."""
    directions: Tensor
    """[S, J, K, W], float32 or bfloat16."""
    bounds: Tensor
    """float32 [S, J, K, 2 + K]: lower bound, upper bound, products with the other directions."""
    counts: Tensor
    """int32 [bindings, J, 3]."""


class _Op(NamedTuple):
    """Op j of every row: columns [N, 1] of its table, and its directions."""

    kind: Tensor
    number: Tensor
    math: Tensor
    sweeps: Tensor
    clamps: Tensor
    factor: Tensor
    inverse: Tensor
    ratio: Tensor
    bounds: Tensor
    u: list[Tensor]


def steer(
    tables: Tables,
    x: Tensor,
    residual: Tensor | None,
    dose: Tensor | None,
    binding: Tensor,
    slot_of: Tensor,
    gain: Tensor,
    sweeps: int,
) -> None:
    """Apply the programs to rows, in place; see SiteBank.apply_.

    Args:
        tables: the bank.
        x: [N, W] in the model's dtype.
        residual: [N, W] or None.
        dose: float32 [N, J, 5] or None.
        binding: int32 [N].
        slot_of: int32 [bindings].
        gain: float32 [N, keys].
        sweeps: the most sweeps that an op with bounds on several directions has.
    """
    owner = binding.long()
    slot = slot_of[owner].long()
    meta, param = tables.meta[slot], tables.param[slot]
    wide = meta[:, 0, 4:5]
    old = x.float()
    stream = None if residual is None else residual.float()
    state = _round(old if stream is None else stream + old, wide)
    total = torch.zeros_like(state)
    chosen = []
    for j in range(meta.shape[1]):
        op = _op(tables, slot, meta[:, j], param[:, j], j)
        strength = gain.gather(1, meta[:, j, 1:2].long())
        selected = (op.kind != 0) & ~strength.isnan()
        change, weights, p, adjusted = _correct(op, _round(state, op.math), sweeps)
        strength = _round(strength, op.math)
        change = torch.where(strength == 1, change, _round(change * strength, op.math))
        after = torch.where(selected, _round(state + change, wide), state)
        total = torch.where(selected, _round(total + change, wide), total)
        clamped = selected & (op.clamps != 0) & (weights != 0).any(dim=1, keepdim=True)
        if dose is not None:
            measured = _measure(op, state, change, after, p, adjusted, clamped)
            dose[:, j].copy_(torch.where(selected, measured, dose[:, j]))
        chosen.append(selected[:, 0])
        tables.counts[:, j, 0].index_add_(0, owner, selected[:, 0].int())
        tables.counts[:, j, 1].index_add_(0, owner, clamped[:, 0].int())
        state = after
    new, made = _finish(old, stream, total, x.dtype)
    x.copy_(torch.where(total != 0, new.to(x.dtype), x))
    for j, one in enumerate(chosen):
        tables.counts[:, j, 2].index_add_(0, owner, (one & made).int())


def update(r: Tensor, x: Tensor, binding: Tensor, add: bool) -> None:
    """Set rows of r to x, or to round(r + x), where the binding is not 0; all of N rows."""
    r.copy_(torch.where(binding[:, None] != 0, r + x if add else x, r))


def _op(tables: Tables, slot: Tensor, meta: Tensor, param: Tensor, j: int) -> _Op:
    kind, _, number, math, _, sweeps, clamps, _ = torch.split(meta, 1, dim=1)
    factor, inverse, ratio, _ = torch.split(param, 1, dim=1)
    u = [tables.directions[slot, j, k].float() for k in range(tables.directions.shape[2])]
    return _Op(kind, number, math, sweeps, clamps, factor, inverse, ratio, tables.bounds[slot, j], u)


def _correct(op: _Op, seen: Tensor, sweeps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the correction before the gain [N, W]; and weights, projections and adjustments [N, K]."""
    length = _round(_norm(seen), op.math)
    there = torch.arange(len(op.u), device=seen.device) < op.number
    projects = there & (op.kind >= LINEAR)
    p = torch.cat([_round(_sum(seen * u), op.math) for u in op.u], 1)
    p = torch.where(projects, p, 0.0)
    low, high, gram = op.bounds[:, :, 0], op.bounds[:, :, 1], op.bounds[:, :, 2:]
    target = _round(p * op.factor, op.math)
    weights = torch.where(projects, _round(_clamp(target, low, high) - p, op.math), 0.0)
    adjusted = weights
    if len(op.u) > 1 and sweeps:
        held, moved = _hildreth(op, p, low, high, gram, sweeps)
        several = projects & (op.kind == BOUNDS)
        weights, adjusted = torch.where(several, held, weights), torch.where(several, moved, adjusted)
    first = torch.where(op.kind == NORM, _round(length * op.factor, op.math), weights[:, :1])
    c = first * op.u[0]
    for k in range(1, len(op.u)):
        c = torch.where(there[:, k : k + 1], c + weights[:, k : k + 1] * op.u[k], c)
    c = torch.where(op.kind == STATIC, op.u[0], _round(c, op.math))
    size, bound = _round(_norm(c), op.math), _round(length * op.ratio, op.math)
    shorter = _round(c * _round(bound / size, op.math), op.math)
    return torch.where((op.ratio != float("inf")) & (size > bound), shorter, c), weights, p, adjusted


def _hildreth(op: _Op, p: Tensor, low: Tensor, high: Tensor, gram: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Return lambda of the sweeps and the adjustment of each projection, [N, K]."""
    count = p.shape[1]
    held = [torch.zeros_like(p[:, :1]) for _ in range(count)]
    for sweep in range(sweeps):
        for i in range(count):
            q = torch.zeros_like(held[i])
            for k in range(count):
                if k != i:
                    q = q + held[k] * gram[:, i, k : k + 1]
            q = _round(q + p[:, i : i + 1], op.math)
            new = _round(_clamp(q, low[:, i : i + 1], high[:, i : i + 1]) - q, op.math)
            held[i] = torch.where((sweep < op.sweeps) & (i < op.number), new, held[i])
    moved = held[0] * gram[:, :, 0]
    for k in range(1, count):
        moved = moved + held[k] * gram[:, :, k]
    return torch.cat(held, 1), _round(_round(p + _round(moved, op.math), op.math) - p, op.math)


def _finish(old: Tensor, stream: Tensor | None, total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return round(old + total) as float32, held in the range of the dtype, and which rows had to be, bool [N]."""
    limits = torch.finfo(dtype)
    new = (old + total).to(dtype).float()
    sound = torch.isfinite(old)
    if stream is not None:
        sound &= torch.isfinite((stream + old).to(dtype))
    new = torch.where(sound, new, old)
    made = sound & ~torch.isfinite(new)
    new = torch.where(made, torch.where(new.isnan(), old, new.clamp(limits.min, limits.max)), new)
    if stream is not None:
        h = (stream + new).to(dtype).float()
        beyond = sound & h.isinf()
        below = limits.max / (2 - limits.eps) * (2 - 2 * limits.eps)  # the largest but one: the sum may round up
        edge = (torch.where(h > 0, below, -below) - stream).clamp(limits.min, limits.max).to(dtype).float()
        new, made = torch.where(beyond, edge, new), made | beyond
    return new, (made & (total != 0)).any(dim=1)


def _measure(
    op: _Op, state: Tensor, change: Tensor, after: Tensor, p: Tensor, adjusted: Tensor, clamped: Tensor
) -> Tensor:
    """Return p_before, p_after, cap_delta, clamped and |c| / |h|, [N, 5]."""
    projects = op.kind >= LINEAR
    before = torch.where(projects, _size(p, op.number), _along(op, state))
    ratio = _norm(change) / _norm(state)
    columns = [
        before,
        _along(op, after),
        _size(adjusted, op.number),
        clamped.float(),
        torch.where(ratio.isnan(), 0.0, ratio),
    ]
    return torch.cat(columns, 1)


def _along(op: _Op, state: Tensor) -> Tensor:
    return _size(torch.cat([_sum(state * u) * op.inverse for u in op.u], 1), op.number)


def _size(values: Tensor, number: Tensor) -> Tensor:
    total = values[:, :1] * values[:, :1]
    for k in range(1, values.shape[1]):
        one = values[:, k : k + 1]
        total = torch.where(k < number, total + one * one, total)
    return torch.where(number > 1, _root(total), values[:, :1])


def _round(v: Tensor, code: Tensor) -> Tensor:
    return torch.where(code == BFLOAT16, v.bfloat16().float(), torch.where(code == FLOAT16, v.half().float(), v))


def _clamp(v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(v < low, low, torch.where(v > high, high, v))


def _norm(v: Tensor) -> Tensor:
    return _root(_sum(v * v))


def _root(v: Tensor) -> Tensor:
    return v.double().sqrt().float()  # torch's float32 root is off by an ulp on some CPUs


def _sum(terms: Tensor) -> Tensor:
    """Return the sum of each row [N, 1], by halves; `terms` is overwritten."""
    count = terms.shape[1]
    while count > 1:
        half = (count + 1) // 2
        terms[:, : count - half] += terms[:, half:count]
        count = half
    return terms[:, :1].clone()
