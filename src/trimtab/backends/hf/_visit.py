"""What happens at a site during a forward pass: rows are captured, steered, and captured again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends._capture import RowSink, Slot, Taken
from trimtab.backends._doses import DoseLedger
from trimtab.backends.hf._batch import Group, Pass
from trimtab.errors import NonFiniteError
from trimtab.sites import Site
from trimtab.steering import Positions, SiteProgram
from trimtab.steering.dose import Detail


class Visit:
    """The work of one batch at all its sites; `at(site)` is what a hook calls.

    Args:
        ledger: counts doses.
        detail: how much of a dose is measured.
        sink: takes captured rows; None captures nothing.
        wanted: positions to capture.
        prompt_logits: whether the site `logits` has the rows of the prompt before its last.
    """

    def __init__(
        self,
        *,
        ledger: DoseLedger,
        detail: Detail,
        sink: RowSink | None,
        wanted: Positions,
        prompt_logits: bool,
    ) -> None:
        self.ledger = ledger
        self.detail: Detail = detail
        self.sink = sink
        self.wanted = wanted
        self.prompt_logits = prompt_logits
        self._step: Pass | None = None
        self._taken: Taken | None = None
        self._tail: Taken | None = None
        self._seen: set[Site] = set()

    def begin(self, step: Pass) -> None:
        """Say which pass comes next."""
        self._step, self._taken, self._tail = step, None, None
        self._seen.clear()

    def taken(self, step: Pass, *, logits: bool) -> Taken:
        """Return the rows of this pass to capture, found once for all sites."""
        assert self._step is not None
        if logits and not self.prompt_logits:
            if self._tail is None:
                self._tail = step.taken(self.wanted)
                for index, item in enumerate(step.items):
                    if item.request.budget == 0 or not step.keeps_logits:
                        self._tail.places[index], self._tail.positions[index] = [], []
            return self._tail
        if self._taken is None:
            self._taken = step.taken(self.wanted)
        return self._taken

    @property
    def step(self) -> Pass:
        """The pass that is running."""
        assert self._step is not None
        return self._step


@dataclass(frozen=True, slots=True)
class SiteVisit:
    """What happens at one site."""

    site: Site
    visit: Visit
    steered: bool
    before: Sequence[Slot]
    after: Sequence[Slot]

    def __call__(self, x: Tensor) -> Tensor | None:
        """Capture, steer, capture; return the new tensor, or None when nothing changed it."""
        visit = self.visit
        step = visit.step
        logits = self.site.point == "logits" and self.site.module is None
        if logits and (x.shape[1] < step.width or not visit.prompt_logits):
            if x.shape[1] > 1:
                return self._last(x, step)
            step = step.tail
            if not step.keeps_logits:
                return None
        return self._rows(x, step, logits)

    def _last(self, x: Tensor, step: Pass) -> Tensor | None:
        """Act on the last place alone, in a model that cannot leave the other logits out."""
        if not step.keeps_logits:
            return None
        last = self._rows(x[:, -1:], step.tail, True)
        return None if last is None else torch.cat((x[:, :-1], last), dim=1)

    def _rows(self, x: Tensor, step: Pass, logits: bool) -> Tensor | None:
        visit = self.visit
        if visit.sink is not None and self.before:
            taken = visit.taken(step, logits=logits)
            for slot in self.before:
                visit.sink.take(slot, x, taken)
        y = x
        if self.steered:
            for group in step.groups:
                program = group.program.get(self.site)
                if program is not None:
                    y = self._steer(program, group, y)
        if visit.sink is not None and self.after:
            taken = visit.taken(step, logits=logits)
            for slot in self.after:
                visit.sink.take(slot, y, taken)
        return None if y is x else y

    def _steer(self, program: SiteProgram, group: Group, x: Tensor) -> Tensor:
        visit = self.visit
        flat = x.reshape(-1, x.shape[-1])
        rows = flat if group.index is None else flat[group.index]
        try:
            applied = program.apply(rows, group.rows, detail=visit.detail)
        except NonFiniteError as error:
            raise NonFiniteError(f"request {self._culprit(program, group, rows)!r}: {error}") from error
        visit.ledger.add(program, applied.dose, group.rows, group.owners)
        if applied.h is rows:
            return x
        if group.index is not None:
            return flat.index_copy(0, group.index, applied.h).reshape(x.shape)
        return applied.h.reshape(x.shape)

    def _culprit(self, program: SiteProgram, group: Group, rows: Tensor) -> str:
        """Return the name of the first request whose rows an op made non-finite."""
        names = [item.name for item in self.visit.step.items]
        owners: list[int] = sorted(set(group.owners.tolist()))
        for owner in owners:
            mine = group.owners == owner
            one = group.rows
            length = one.prompt_length if isinstance(one.prompt_length, int) else one.prompt_length[mine]
            tokens = None if one.token_ids is None else one.token_ids[mine]
            try:
                program.apply(rows[mine], positions=one.positions[mine], prompt_length=length, token_ids=tokens)
            except NonFiniteError:
                return names[owner]
        return ", ".join(names[owner] for owner in owners)
