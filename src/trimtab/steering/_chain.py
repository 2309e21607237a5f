"""The ops of one site made ready for a dtype and device, and run one after another over rows.

On the CPU rows go through in blocks that fit the cache: what lies between h and h' (the float32 copy of bfloat16
states, corrections, sums) never reaches memory. Rows are independent, so blocks do not change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from trimtab.steering._arithmetic import limit, round_to
from trimtab.steering.gains import Constant, Gain
from trimtab.steering.ops import Kernel, Op, Raw
from trimtab.steering.positions import Positions
from trimtab.steering.rows import Selected

BLOCK = 1 << 16
"""Elements of a block, per thread: a quarter of a megabyte in float32, of which a few live at a time."""

Note: TypeAlias = Callable[[int, Raw, tuple[Tensor, Tensor, Tensor]], None]
"""Told of every op that ran: its index, what it computed, and (state before, change, state after)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One op of a site: its place among the op list, and the rows and gain it acts with."""

    name: str
    op: Op
    positions: Positions
    gain: Gain
    key: str


class Chain(NamedTuple):
    """The ops of a site for one dtype and device."""

    state: torch.dtype
    """Widest math of the ops: the state between ops is held in it."""
    final: torch.dtype
    """Dtype in which h + c is formed, before it is rounded once into the model's."""
    steps: tuple[tuple[Step, Kernel, torch.dtype], ...]
    static: Tensor | None
    """[D] in `final`: the whole correction of a site whose only op is the same for every row."""
    whole: bool
    """Whether an op must be given all rows at once."""


def make(steps: Sequence[Step], device: torch.device, dtype: torch.dtype) -> Chain:
    """Cast the directions for rows of `dtype` on `device`."""
    ready = []
    for step in steps:
        math = step.op.math_dtype(dtype)
        ready.append((step, step.op.kernel(math, device), math))
    state = ready[0][2]
    for _, _, math in ready[1:]:
        state = torch.promote_types(state, math)
    final = torch.promote_types(state, dtype)
    static = _constant(*ready[0]) if len(ready) == 1 else None
    if static is not None:
        # x + (-0.0) is x for every x, -0.0 included: zeros of the correction must not change bits
        static = torch.where(static == 0, torch.full_like(static, -0.0), static).to(final)
    return Chain(state, final, tuple(ready), static, not all(kernel.rowwise for _, kernel, _ in ready))


def spans(h: Tensor, chain: Chain) -> list[tuple[int, int]]:
    """Return the blocks of rows [start, stop) to run `h` [N, D] in; at least two rows each, unless there is one.

    A single long row is the one shape that torch sums in pieces, one per thread: its last bits would be another's.
    """
    count, width = h.shape
    if chain.whole or h.device.type != "cpu" or count * width <= BLOCK:
        return [(0, count)]
    parts = max(1, count // max(2, BLOCK * torch.get_num_threads() // width))
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def run(chain: Chain, h: Tensor, positions: Tensor, chosen: Sequence[Selected], note: Note | None = None) -> Tensor:
    """Return the rows after the ops, `h` itself when no op selects one of them.

    They are in `chain.final` or in the model's dtype: the caller rounds, who may do so while copying.

    Args:
        chain: the ops.
        h: [N, D] in the model's dtype.
        positions: absolute positions, int64 [N].
        chosen: the rows that each op selects.
        note: told of every op that ran.
    """
    if all(one.none for one in chosen):
        return h
    if chain.static is not None and note is None:
        out = h + chain.static
        mask = chosen[0].mask
    else:
        wide = h.to(chain.final)
        total = _total(chain, wide, positions, chosen, note).to(chain.final)
        # x - (+0.0) is x for every x, -0.0 included, and 0.0 - c is +0.0 for both zeros
        out = wide - (0.0 - total)
        mask = _union(chosen)
    return out if mask is None else torch.where(mask[:, None], out.to(h.dtype), h)


def _total(chain: Chain, h: Tensor, positions: Tensor, chosen: Sequence[Selected], note: Note | None) -> Tensor:
    """Return the sum of the corrections, [N, D] in the dtype of the state."""
    state = h.to(chain.state)
    total: Tensor | None = None
    for index, ((step, kernel, math), selected) in enumerate(zip(chain.steps, chosen, strict=True)):
        if selected.none:
            continue
        if kernel.require is not None and h.device.type == "cpu":
            kernel.require(positions if selected.mask is None else positions[selected.mask])
        seen = state.to(math)
        raw = kernel.correct(seen, positions)
        change = _shape(raw.correction, seen, step, selected, math).to(chain.state)
        total = change if total is None else total + change
        before = state
        if note is not None or index + 1 < len(chosen):
            state = state + change
        if note is not None:
            note(index, raw, (before, change, state))
    assert total is not None
    return total


def _constant(step: Step, kernel: Kernel, math: torch.dtype) -> Tensor | None:
    """Return the correction of an op that is the same for every row, gain included."""
    if kernel.static is None or step.op.max_ratio is not None or not isinstance(step.gain, Constant):
        return None
    return kernel.static * round_to(step.gain.value, math)


def _shape(c: Tensor, seen: Tensor, step: Step, selected: Selected, math: torch.dtype) -> Tensor:
    """Return the correction with the norm limit, the gain and the selection, in the op's math."""
    if step.op.max_ratio is not None:
        c = limit(c, seen, round_to(step.op.max_ratio, math))
    if selected.gain is not None:
        c = c * selected.gain.to(math)[:, None]
    elif isinstance(step.gain, Constant) and step.gain.value != 1:
        c = c * round_to(step.gain.value, math)
    return c if selected.mask is None else torch.where(selected.mask[:, None], c, 0.0)


def _union(chosen: Sequence[Selected]) -> Tensor | None:
    """Return which rows some op selects, None when one of them selects every row."""
    mask = chosen[0].mask
    for one in chosen[1:]:
        mask = None if mask is None or one.mask is None else mask | one.mask
    return mask
