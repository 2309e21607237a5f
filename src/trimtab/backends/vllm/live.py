"""A tap of a running model: what happens to the rows of one tensor while the model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.backends.vllm.bank import SiteBank, StepRows, update_residual_
from trimtab.backends.vllm.captured import Recorder
from trimtab.backends.vllm.doses import COLUMNS, DoseRecorder
from trimtab.backends.vllm.kernels import native
from trimtab.backends.vllm.step import Span, Step
from trimtab.backends.vllm.taps import Tap
from trimtab.errors import BackendError, TrimtabError
from trimtab.sites import Site
from trimtab.steering import Rows

if TYPE_CHECKING:
    from trimtab.steering import SiteProgram
    from trimtab.steering.dose import Detail, OpDose

_AFTER = {"none": 0, "set": 1, "add": 2}


class LiveStage:
    """One site of a tap: its state is the tensor itself, or the residual stream plus the tensor.

    Args:
        site: what it is.
        bank: the steerings that can act here; None where rows are only recorded.
        residual: the stream before the tensor is added, [max_rows, width]; None when the state is the tensor itself.
    """

    def __init__(self, site: Site, bank: SiteBank | None, residual: Tensor | None) -> None:
        self.site = site
        self.bank = bank
        self._residual = residual

    def __call__(self, x: Tensor, step: Step, recorder: Recorder, doses: DoseRecorder) -> None:
        """Record and change the rows of this pass."""
        wanted = step.wanted.get(self.site)
        if wanted is not None and "before" in wanted.edits:
            recorder.take(self.site, "before", self._state(x, wanted.rows), wanted, step.shift)
        if self.bank is not None:
            buffer = None if step.measured is None else doses.buffer(self.site)
            self.bank.apply_(x, self._residual, step.rows, buffer)
            for span in step.special.get(self.site, ()):
                self._outside(x, span, buffer)
        if wanted is not None and "after" in wanted.edits:
            recorder.take(self.site, "after", self._state(x, wanted.rows), wanted, step.shift)

    def handles(self, rows: StepRows, doses: DoseRecorder) -> tuple[int, ...]:
        """Return the numbers of its bank in the CPU kernel: without and with full doses."""
        return () if self.bank is None else self.bank.handles(rows, self._residual, doses.buffer(self.site))

    def _state(self, x: Tensor, rows: Tensor) -> Tensor:
        picked = x.index_select(0, rows)
        return picked if self._residual is None else self._residual.index_select(0, rows) + picked

    def _outside(self, x: Tensor, span: Span, buffer: Tensor | None) -> None:
        """Run a program that the banks cannot hold on the rows of its request; correct `x` as the banks do.

        A program that cannot act leaves the rows as they are and says why in what the request leaves: an exception here
        would end the engine for everyone.
        """
        one = span.bound
        assert one.program is not None
        program: SiteProgram = one.program[self.site]
        rows = slice(span.first, span.first + span.length)
        own = x[rows]
        state = own.float() if self._residual is None else self._residual[rows].float() + own.float()
        positions = torch.arange(span.start, span.start + span.length, device=x.device)
        ids = None if one.token_ids is None else one.token_ids.to(x.device)
        detail: Detail = "counts" if buffer is None and one.counted <= span.start else "full"
        try:
            applied = program.apply(state, Rows(positions, one.prompt_length, ids, padded=False), detail=detail)
        except TrimtabError as error:
            if not one.problems:
                one.problems.append(str(error))
            return
        change = applied.h - state
        limit = torch.finfo(x.dtype).max
        moved = own.float() + change
        new = torch.where(change == 0, own, moved.clamp(-limit, limit).to(own.dtype))
        over = (moved.abs() > limit).any(dim=1)
        own.copy_(new)
        self._account(span, applied.dose, over, buffer)

    def _account(self, span: Span, made: Sequence[OpDose], over: Tensor, buffer: Tensor | None) -> None:
        """Count what the ops outside the banks did; rows that are computed again were counted before."""
        assert self.bank is not None
        one = span.bound
        for op, dose in enumerate(made):
            places, counts = dose.positions, self.bank.counts[one.number, op]
            if places is None:
                counts[0] += dose.rows
                counts[2] += over.sum()
                continue
            fresh = places >= one.counted
            counts[0] += fresh.sum()
            counts[2] += (over[places - span.start] & fresh).sum()
            if buffer is not None:
                columns = [getattr(dose, name) for name in COLUMNS]
                buffer[places - span.start + span.first, op] = torch.stack([part.float() for part in columns], dim=1)


class LiveTap:
    """What the operator of one tap calls.

    Args:
        tap: where it sits.
        stages: its sites, in order.
        step: the tables of the pass.
        residual: the stream, where the model's is followed.
        recorder: where recorded rows go.
        doses: where full doses go.
    """

    def __init__(
        self,
        tap: Tap,
        stages: Sequence[LiveStage],
        step: Step,
        residual: Tensor | None,
        recorder: Recorder,
        doses: DoseRecorder,
    ) -> None:
        self.tap = tap
        self._stages = tuple(stages)
        self._step = step
        self._stream = residual
        self._recorder = recorder
        self._doses = doses
        self.beside: Callable[[Tensor | None], Tensor | None] | None = None
        """Gives `changes`, where the tap's tensor is not stored."""
        self._number, self._own = step.join(stage.site for stage in stages)

    @property
    def calls(self) -> int:
        """Passes in which it had something to do itself; the next tap acts for one that joins it."""
        return int(self._own[0])

    @property
    def joins(self) -> bool:
        """Whether the next tap may do what it does."""
        return self.tap.joins

    @property
    def acts(self) -> bool:
        """Whether it, or one after it, has something to do in this pass."""
        return self._step.active and self._number <= self._step.last

    def enrolled(self, name: str) -> None:
        """Have the CPU kernel run this tap, where there is one: it asks for Python only when a pass needs it."""
        kernel, step, columns = native(), self._step, self.tap.columns or (0, -1)
        if kernel is None or step.device.type != "cpu":
            return
        handles = [number for stage in self._stages for number in stage.handles(step.rows, self._doses)]
        tables, place = [step.control, self._own, step.rows.binding], [self._number, *columns, _AFTER[self.tap.after]]
        kernel.enroll(name, handles, tables, self._stream, place)
        step.native = True
        weakref.finalize(self, kernel.leave, name)

    def changes(self, x: Tensor | None) -> Tensor | None:
        """Return the elements that it changes, where its tensor is not stored: [rows, width], NaN for the others.

        None: it has nothing to do in this pass.

        Args:
            x: what enters its module; None: that was made before the graph runs.
        """
        assert self.beside is not None
        return self.beside(x)

    def __call__(self, x: Tensor, before: Tensor | None = None) -> None:
        """Record and change the tracked rows of `x` [rows, width], in place.

        Args:
            x: the tap's tensor.
            before: that of the tap before, which joins this one: it is added to the stream first.
        """
        step = self._step
        if not step.active:
            return
        self._own[0] += 1
        if x.dim() != 2:
            x = x.view(-1, x.shape[-1])
        if before is not None and self._stream is not None:
            update_residual_(self._stream, before.view(-1, before.shape[-1]), step.rows, "add")
        if x.shape[0] < step.rows.n:
            raise BackendError(
                f"{self.tap.name}: the model passes {x.shape[0]} rows where the batch has {step.rows.n}; its rows are "
                "sharded or reordered (sequence parallelism?), which steering cannot follow"
            )
        seen = x if self.tap.columns is None else x[:, self.tap.columns[0] : self.tap.columns[1]]
        for stage in self._stages:
            stage(seen, step, self._recorder, self._doses)
        if self._stream is not None and self.tap.after != "none":
            update_residual_(self._stream, x, step.rows, self.tap.after)


def stages_of(tap: Tap, banks: Mapping[Site, SiteBank], residual: Tensor | None) -> list[LiveStage]:
    """Return the sites of a tap, each with its bank."""
    return [
        LiveStage(stage.site, banks.get(stage.site), residual if stage.over_residual else None) for stage in tap.stages
    ]
