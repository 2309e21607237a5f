"""Module calls put together from their recorded inputs and outputs, and how much each amplifies an error."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.results.triage import Direction, ModuleCall
from trimtab.workflows.triage._tensors import Tensor, owner

MADE = 3.0
"""An output error of so many times the propagated one was made by the module itself."""


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module, forward or backward, as far as it was recorded."""

    path: str
    direction: Direction
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    before: Tensor | None = None
    """Without a recorded input: the last output before it, which may have been its input."""

    @property
    def sources(self) -> list[Tensor]:
        """What the error may have come from."""
        return self.inputs or ([self.before] if self.before is not None else [])

    @property
    def input_error(self) -> float | None:
        """Largest relative error of what came in."""
        return max((one.error for one in self.sources), default=None)

    @property
    def worst_output(self) -> Tensor:
        """The output that differs most; the first of those that fail."""
        return max(self.outputs, key=lambda one: (one.failed, one.doubtful, one.error))

    @property
    def amplification(self) -> float:
        """Output error over propagated input error."""
        return amplification(self.sources, self.worst_output)

    @property
    def status(self) -> str:
        """Whether this call made an error, carried one, or agrees."""
        if not any(one.failed or one.doubtful for one in self.outputs):
            return "agrees"
        return "carried" if any(one.failed for one in self.sources) and self.amplification < 10 * MADE else "made"

    def result(self, made_in: str | None = None) -> ModuleCall:
        """Return the line of the report.

        Args:
            made_in: path of the module that made the error; those around it contain it.
        """
        out = self.worst_output
        key = out.record.key
        around = (
            made_in is not None
            and made_in != self.path
            and f"{made_in}.".startswith(f"{self.path}." if self.path else "")
        )
        return ModuleCall(
            module_path=self.path,
            module_class=out.module_class,
            layer=key.layer,
            direction=self.direction,
            phase=key.phase,
            step=key.step,
            micro_step=key.micro_step,
            rank=key.rank,
            call_index=key.call_index,
            order=out.record.order,
            input_error=self.input_error,
            output_error=out.error,
            expected=out.expected,
            amplification=self.amplification,
            status="contains" if around and self.status == "made" else self.status,
        )


def amplification(sources: Sequence[Tensor], out: Tensor) -> float:
    """Return the error of `out` over that of its sources, by the whole tensor or by the worst row.

    An input error below what rounding explains counts as that, so that agreeing inputs do not divide by zero.
    """
    ratios = []
    for measure in ("error", "worst"):
        came_in = max((getattr(one, measure) for one in sources), default=0.0)
        floor = max(came_in, out.expected)
        here = getattr(out, measure)
        ratios.append(0.0 if here == 0 else here / floor if 0 < floor < math.inf else 1.0 if came_in else math.inf)
    return max(ratios)


def build_calls(tensors: Sequence[Tensor]) -> list[Call]:
    """Return the calls in the order of their first output."""
    calls: dict[tuple[Any, ...], Call] = {}
    last: dict[tuple[Any, ...], Tensor] = {}
    gradients = _backward_of(tensors)
    for one in tensors:
        if one.path is None or one.side in ("param", "optim"):
            continue
        where = (one.group, one.direction)
        if one.side == "param_grad":
            call = gradients(calls, one)
        else:
            key = (*where, one.path, one.record.key.call_index)
            call = calls.setdefault(key, Call(one.path, one.direction))
        came_in = one.side in ("input", "grad_output")
        if not came_in and not call.inputs and not call.outputs:
            call.before = last.get(where)
        (call.inputs if came_in else call.outputs).append(one)
        if not one.record.metrics or one.record.metrics.numel > 1:
            last[where] = one
    return sorted((call for call in calls.values() if call.outputs), key=lambda call: call.outputs[0].place)


def _backward_of(tensors: Sequence[Tensor]) -> Any:
    """Parameter gradients belong to the backward call of the module that owns them, in that step on that rank."""
    latest: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for one in tensors:
        if one.side == "grad_output":
            key = one.record.key
            latest[(key.phase, key.step, key.rank, one.path)].append(one)

    def find(calls: dict[tuple[Any, ...], Call], gradient: Tensor) -> Call:
        key = gradient.record.key
        path = gradient.path or owner(key.name)
        call = calls.setdefault(("param", key.phase, key.step, key.rank, path), Call(path, "backward"))
        if not call.inputs:
            call.inputs = list(latest[(key.phase, key.step, key.rank, path)])
        return call

    return find
