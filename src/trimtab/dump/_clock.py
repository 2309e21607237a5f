"""Where in a run the program is: phase, step, micro step, and how often something ran within it."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.dump.config import StepRange

BACKWARD = "fwd_bwd"


def in_backward() -> bool:
    """Whether autograd is running: a module that is called then is recomputed."""
    return bool(torch._C._current_graph_task_id() != -1)


class Clock:
    """Counts steps, and the forward passes of a phase within a step."""

    def __init__(self, steps: StepRange, phase: str) -> None:
        self.step = 0
        self.micro_step = 0
        self.phase = phase or "inference"
        self.epoch = 0
        """Changes whenever calls are counted anew."""
        self.recording = 0 in steps
        self._steps = steps
        self._fixed = phase
        self._given: int | None = None
        self._passes: dict[str, int] = {}

    def begin_forward(self, training: bool) -> None:
        """A model is called: a micro step begins."""
        if not self._fixed:
            self.phase = BACKWARD if torch.is_grad_enabled() else "fwd_only" if training else "inference"
        passed = self._passes.get(self.phase, 0)
        self._passes[self.phase] = passed + 1
        self.micro_step = passed if self._given is None else self._given
        self.epoch += 1

    def set_phase(self, name: str) -> str:
        """Name the phase ("" tells it from grad mode and train mode again); return what was set before."""
        before, self._fixed = self._fixed, name
        if name:
            self.phase = name
        return before

    def set_micro_step(self, number: int) -> None:
        """Number the forward passes from here on."""
        self._given = self.micro_step = number
        self.epoch += 1

    def next_step(self) -> None:
        """A step has ended."""
        self.step += 1
        self.micro_step, self._given = 0, None
        self._passes.clear()
        self.epoch += 1
        self.recording = self.step in self._steps

    def tags(self) -> dict[str, Any]:
        """Return the columns that say when."""
        return {"phase": self.phase, "step": self.step, "micro_step": self.micro_step}


class Calls:
    """Numbers the calls of one thing within a micro step; recomputed ones are numbered on their own."""

    __slots__ = ("_clock", "_counts", "_epoch", "last")

    def __init__(self, clock: Clock) -> None:
        self.last = 0
        self._clock = clock
        self._epoch = -1
        self._counts = [0, 0]

    def next(self, recompute: bool) -> int:
        """Return the number of the call that begins now."""
        if self._epoch != self._clock.epoch:
            self._epoch = self._clock.epoch
            self._counts = [0, 0]
        self.last = self._counts[recompute]
        self._counts[recompute] += 1
        return self.last
