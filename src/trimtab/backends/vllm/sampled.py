"""The rows that are sampled from: the site `logits`, and tokens that a request is forced along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.backends.vllm.live import LiveStage
from trimtab.backends.vllm.state import WorkerState
from trimtab.backends.vllm.step import Step, Wanted
from trimtab.sites import Site

LOGITS = Site.parse("logits")


class SampledRows:
    """Follows the last row of each request, whose logits give its next token.

    Args:
        state: of the worker.
    """

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._stage = LiveStage(LOGITS, state.banks.get(LOGITS), None)
        self._wanted = LOGITS in state.recorded
        size = len(state.step.rows.slot_of) - 1
        self._step = Step(size, size, state.config.keys_per_steering, state.step.device)
        self._step.rows.slot_of = state.step.rows.slot_of
        self._checked: tuple[Sequence[str | None], Tensor] = (), torch.empty(0, dtype=torch.int64)

    def check(self, logits: Tensor, ids: Sequence[str | None]) -> None:
        """Note whose logits, float [requests, vocabulary], give no token a probability.

        A row gives none when its largest number is not finite: NaN is larger than all. Some may be -inf: tokens that a
        request leaves out. Rows that end inside the prompt give no token. The flags stay on the device until a request
        ends.
        """
        step, flags = self._state.step, self._state.nonfinite_logits
        if not step.check_logits:
            return
        if step.shift == 0 or self._checked[0] != ids:
            places = {
                span.bound.req_id: span.bound.number
                for span in step.spans
                if span.bound.data.check_logits and span.start + span.length >= span.bound.prompt_length
            }
            numbers = torch.tensor([places.get(name or "", 0) for name in ids])  # 0: noted of nobody
            if flags.device.type == "cuda":  # so that nothing waits for the device
                numbers = numbers.pin_memory()
            self._checked = list(ids), numbers.to(flags.device, non_blocking=True)
        numbers = self._checked[1]
        flags[numbers] |= ~logits.amax(dim=-1).isfinite()

    def logits(self, logits: Tensor, ids: Sequence[str | None], starts: Any, computed: Any) -> None:
        """Change and record the logits [requests, vocabulary] of a batch, in place.

        A row that ends inside the prompt predicts a token that is known, and is left alone.
        """
        if not self._wanted:
            return
        state, counts = self._state, starts[1:] - starts[:-1]
        last = computed + counts - 1
        bound = {
            req_id: state.bound[req_id]
            for req_id, row in zip(ids, last, strict=True)
            if req_id in state.bound and row >= state.bound[req_id].prompt_length - 1
        }
        if not bound:
            return
        step, tokens = self._step, state.step.token_ids
        step.begin_last(bound, ids, last, None if tokens is None else tokens[torch.from_numpy(starts[1:] - 1)])
        try:
            self._stage(logits, step, state.recorder, state.doses)
            state.doses.take(step, logits=True)
        finally:
            step.active = False

    def prompt(self, hidden: Tensor, compute: Callable[[Tensor], Tensor | None]) -> None:
        """Record the logits of prompt rows before the last one, for the requests that want them; no op acts there.

        Args:
            hidden: what the model returned, [rows, width].
            compute: gives logits of rows.
        """
        for span in self._state.step.spans if self._state.step.prompt_logits else ():
            one = span.bound
            stop = min(span.start + span.length, one.prompt_length - 1)
            wants = one.data.capture is not None and one.data.capture.prompt_logits and LOGITS in one.capture_sites
            if not wants or span.start >= stop or one.captured is None:
                continue
            where = torch.arange(span.start, stop)
            chosen = one.captured.mask(where, one.prompt_length, torch.tensor(one.prompt_ids)[where])
            positions = where[chosen]
            logits = compute(hidden[(positions - span.start + span.first).to(hidden.device)])
            if logits is not None:
                wanted = Wanted(((one, len(positions)),), positions, positions, frozenset(one.edits))
                for edit in one.edits:
                    self._state.recorder.take(LOGITS, edit, logits.clone(), wanted, 0)

    def force(self, tokens: Tensor, ids: Sequence[str | None]) -> Tensor:
        """Return the sampled tokens [requests], those of forced requests replaced."""
        self._state.step.settle()
        forced = [
            (row, one.data.forced[index])
            for row, one in ((row, self._state.bound.get(req_id or "")) for row, req_id in enumerate(ids))
            if one is not None
            and one.data.forced is not None
            and 0 <= (index := one.done - one.prompt_length) < len(one.data.forced)
        ]
        if not forced:
            return tokens
        rows, values = zip(*forced, strict=True)
        chosen = tokens.clone()
        chosen[torch.tensor(rows, device=tokens.device)] = torch.tensor(
            values, dtype=tokens.dtype, device=tokens.device
        )
        return chosen
