"""One batch, from prompt to last token: prefill, then one token at a time on a KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab import hooks
from trimtab.architectures import ModelMap
from trimtab.backends._capture import RowOwner, RowSink, Slot
from trimtab.backends._doses import DoseLedger, DoseOwner
from trimtab.backends._item import Item
from trimtab.backends._sampling import LogProbs
from trimtab.backends.base import Capture
from trimtab.backends.hf._batch import Layout, Pass
from trimtab.backends.hf._visit import SiteVisit, Visit
from trimtab.errors import BackendError, UnfiredError
from trimtab.results.runs import DoseSummary
from trimtab.sites import Site
from trimtab.steering import Positions
from trimtab.steering.dose import Detail

if TYPE_CHECKING:
    from trimtab.trace import Writer


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The model and how it is called."""

    model: nn.Module
    device: torch.device
    map: ModelMap
    parameters: frozenset[str]
    """Names that the model's forward takes."""
    chunk: int | None

    def handle(self, site: Site) -> hooks.HookPoint:
        """Return where a site is, module sites included."""
        return self.map.handle(site) if site.module is None else hooks.module_handle(self.model, site)


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What is captured, resolved against the model."""

    capture: Capture
    positions: Positions
    handles: Mapping[Site, hooks.HookPoint]
    counts: dict[Site, int] = field(default_factory=dict)
    """Rows written so far."""

    def check_calls(self, calls: Mapping[Site, int]) -> None:
        """Refuse a site that never ran, naming its hook.

        Raises:
            BackendError: see there.
        """
        for site, handle in self.handles.items():
            if not calls.get(site, 0):
                raise BackendError(
                    f"nothing was captured at {site}: the hook on module {handle.module_path!r} never ran; the module "
                    "is not on the path of this forward pass"
                )

    def check_counts(self, items: Sequence[Item]) -> None:
        """Refuse positions that selected no row of any request.

        Raises:
            UnfiredError: see there.
        """
        for site in self.handles:
            idle = site.point == "logits" and all(item.request.budget == 0 for item in items)
            if not self.counts.get(site, 0) and not idle:
                rows = ", ".join(str(item.rows) for item in items[:8])
                raise UnfiredError(
                    f"nothing was captured at {site}: positions {self.positions} select none of the rows of "
                    f"{len(items)} requests ({rows} rows); choose other positions, or pass allow_unfired=True"
                )


class BatchRun:
    """The forward passes of one batch.

    Args:
        setting: the model.
        layout: how the batch is padded.
        items: its requests.
        plan: what is captured.
        writer: where captured rows and doses go.
        config: name of the configuration in the trace.
        detail: how much of a dose is measured.
    """

    def __init__(
        self,
        setting: Setting,
        layout: Layout,
        items: Sequence[Item],
        *,
        plan: CapturePlan | None = None,
        writer: Writer | None = None,
        config: str = "",
        detail: Detail = "counts",
    ) -> None:
        self._setting, self._layout, self._items, self._plan = setting, layout, items, plan
        self._slots: list[Slot] = []
        self._end = 0  # columns of the attention mask that are in use
        owners = [DoseOwner(one.name, one.request.prompt_index, one.program, one.length) for one in items]
        self._ledger = DoseLedger(owners, config=config, writer=writer)
        self._sites = self._site_slots()
        sink = None
        if plan is not None and writer is not None:
            names = [RowOwner(one.name, one.request.prompt_index) for one in items]
            sink = RowSink(writer, names, slots=len(self._slots), config=config, counts=plan.counts)
        self._sink = sink
        self._visit = Visit(
            ledger=self._ledger,
            detail=detail,
            sink=sink,
            wanted=Positions.parse("all") if plan is None else plan.positions,
            prompt_logits=plan is not None and plan.capture.prompt_logits,
        )

    def generate(self, *, allow_unfired: bool) -> list[tuple[DoseSummary, ...]]:
        """Run the batch to its end and return the doses of each request."""
        with self._attached() as attached:
            logits, cache = self._prefill(all_logits=self._visit.prompt_logits)
            while True:
                self._accept(logits)
                if all(item.stop is not None for item in self._items):
                    break
                output = self._forward(self._layout.next_pass(), cache, keep=1)
                logits, cache = output.logits[:, -1], output.past_key_values
            return self._finish(attached.calls, allow_unfired)

    def score(self) -> list[list[float]]:
        """Run the prompts alone and return the log-probability of each token after the first."""
        self._visit.prompt_logits = True  # the site `logits` is steered at every row
        found: list[list[float]] = [[] for _ in self._items]
        ids, cache = self._layout.ids.to(self._setting.device), None
        with self._attached() as attached:
            for start, end in self._layout.chunks(self._setting.chunk):
                output = self._forward(self._layout.prompt_pass(start, end), cache, keep=0)
                cache = output.past_key_values
                last = min(end, self._layout.width - 1)
                for index, item in enumerate(self._items):
                    first = max(start, self._layout.width - item.length)
                    if first < last:
                        rows = output.logits[index, first - start : last - start]
                        found[index] += LogProbs(rows).of(ids[index, first + 1 : last + 1]).tolist()
            self._finish(attached.calls, False)
        return found

    def _site_slots(self) -> dict[Site, tuple[hooks.HookPoint, bool, list[Slot], list[Slot]]]:
        """Return, for every site with work, its handle, whether it is steered, and the rows taken before and after."""
        steered = {site for item in self._items for site in (item.program or ())}
        captured = {} if self._plan is None else self._plan.handles
        found = {}
        for site in sorted(steered | set(captured), key=lambda one: one.sort_key):
            before: list[Slot] = []
            after: list[Slot] = []
            if site in captured:
                before, after = self._make_slots(site, captured[site])
            handle = captured.get(site) or self._setting.handle(site)
            found[site] = (handle, site in steered, before, after)
        return found

    def _make_slots(self, site: Site, handle: hooks.HookPoint) -> tuple[list[Slot], list[Slot]]:
        assert self._plan is not None
        edited = tuple(i for i, item in enumerate(self._items) if item.program is not None and site in item.program)
        plain = tuple(i for i in range(len(self._items)) if i not in edited)
        path, wanted = handle.module_path, self._plan.capture.edit
        before = [Slot(site, "before", edited, path)] if edited and "before" in wanted else []
        after = [Slot(site, "after", edited, path)] if edited and "after" in wanted else []
        if plain:
            after.append(Slot(site, "none", plain, path))
        self._slots += before + after
        return before, after

    def _attached(self) -> hooks.HookSet:
        return hooks.attach(
            self._setting.model,
            [
                (handle, SiteVisit(site, self._visit, steered, before, after))
                for site, (handle, steered, before, after) in self._sites.items()
            ],
        )

    def _prefill(self, *, all_logits: bool) -> tuple[Tensor, Any]:
        cache, output = None, None
        for start, end in self._layout.chunks(self._setting.chunk):
            output = self._forward(self._layout.prompt_pass(start, end), cache, keep=0 if all_logits else 1)
            cache = output.past_key_values
        assert output is not None
        return output.logits[:, -1], cache

    def _forward(self, step: Pass, cache: Any, *, keep: int) -> Any:
        setting = self._setting
        self._visit.begin(step)
        self._end += step.width
        arguments: dict[str, Any] = {
            "input_ids": step.ids.to(setting.device),
            # always given: pads are not found by their id, because a pad token may be a real one (EOS)
            "attention_mask": self._layout.mask[:, : self._end],
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in setting.parameters:
            arguments["position_ids"] = self._layout.model_positions(step)
        if "logits_to_keep" in setting.parameters:
            arguments["logits_to_keep"] = keep
        output = setting.model(**arguments)
        if getattr(output, "past_key_values", None) is None:
            raise BackendError(f"{type(setting.model).__name__} returned no KV cache; a model with one was expected")
        return output

    def _accept(self, logits: Tensor) -> None:
        """Choose the next token of every request that is not finished; `logits` is [B, vocab]."""
        running = [index for index, item in enumerate(self._items) if item.stop is None]
        if not running:
            return
        shares = LogProbs(logits)
        values = shares.values
        chosen = values.argmax(-1).tolist()
        for index in running:
            if not self._items[index].greedy:
                chosen[index] = self._items[index].choose(values[index])
        logprobs = shares.of(torch.tensor(chosen, device=values.device)).tolist()
        count = max(self._items[index].request.logprobs or 0 for index in running)
        best: list[tuple[tuple[int, float], ...]] = [()] * len(self._items)
        if count:
            top, ids = (column.tolist() for column in shares.top(count))
            best = [tuple(zip(*pair, strict=True)) for pair in zip(ids, top, strict=True)]
        for index in running:
            self._items[index].accept(chosen[index], logprobs[index], best[index])

    def _finish(self, calls: Mapping[Site, int], allow_unfired: bool) -> list[tuple[DoseSummary, ...]]:
        for item in self._items:
            if item.program is not None:
                item.program.check()
        if self._sink is not None and self._plan is not None:
            for slot in self._slots:
                self._sink.flush(slot)
            self._plan.check_calls(calls)
        return self._ledger.finish([item.rows for item in self._items], calls, allow_unfired=allow_unfired)
