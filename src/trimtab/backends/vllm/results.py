"""From what an engine leaves to what a backend returns: generations, doses, records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.backends.base import Capture, EncodedPrompt, Generation, Request, Score, Stop, num_rows
from trimtab.backends.vllm.counts import OpReport
from trimtab.backends.vllm.reports import CapturedRows, Report
from trimtab.errors import BackendError, NonFiniteError, NotAppliedError, UnfiredError
from trimtab.results.runs import DoseSummary
from trimtab.sites import Site
from trimtab.steering import Positions
from trimtab.trace import DoseRow

if TYPE_CHECKING:
    from trimtab.steering import Program
    from trimtab.trace import Writer


@dataclass(slots=True)
class Job:
    """One request on its way through an engine."""

    name: str
    request: Request
    prompt: EncodedPrompt
    program: Program | None
    params: Any = None
    report: Report | None = None
    output: Any = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    stop: Stop = "length"

    @property
    def length(self) -> int:
        """Number of prompt tokens."""
        return len(self.prompt.ids)

    def take(self, output: Any, report: Report) -> None:
        """Take what the engine gave: vLLM's `RequestOutput`, and our report."""
        self.output, self.report = output, report
        completion = output.outputs[0]
        budget = self.request.budget
        self.tokens = [int(token) for token in completion.token_ids][:budget]
        if completion.logprobs:
            self._take_logprobs(completion.logprobs)
        if report.nonfinite_logits:
            raise self._nonfinite(f"the logits of one of its {len(self.tokens)} tokens")
        forced = self.request.forced_tokens is not None
        self.stop = "forced" if forced else "eos" if completion.finish_reason == "stop" else "length"

    def _take_logprobs(self, flat: Any) -> None:
        """Take vLLM's `FlatLogprobs`: of every step the chosen token, then the most likely ones."""
        starts = flat.start_indices[: len(self.tokens)]
        if [flat.token_ids[start] for start in starts] != self.tokens[: len(starts)]:
            raise BackendError(f"request {self.name!r}: the engine gave log-probabilities of tokens it did not choose")
        self.logprobs = [flat.logprobs[start] for start in starts]
        for step, value in enumerate(self.logprobs):
            if math.isnan(value):
                raise self._nonfinite(f"the logits at position {self.length + step - 1}")
        for step in range(len(starts) if self.request.logprobs else 0):
            best = sorted(flat[step].items(), key=lambda pair: pair[1].rank)
            self.top.append(tuple((one, info.logprob) for one, info in best)[: self.request.logprobs])

    def _nonfinite(self, which: str) -> NonFiniteError:
        return NonFiniteError(
            f"request {self.name!r}: {which} are not finite; the model left the range of its dtype: use bfloat16 or "
            "float32, or lower the steering"
        )

    @property
    def rows(self) -> int:
        """Rows that the request has by the rows law."""
        return num_rows(self.length, len(self.tokens))


def finish(
    job: Job,
    sites: Sequence[Site],
    capture: Capture | None,
    writer: Writer | None,
    config: str,
    allow_unfired: bool,
    tokenizer: Any,
) -> Generation:
    """Write the records and doses of a finished request, and return its generation.

    Raises:
        NotAppliedError: an op was asked for and did not act where its rows were computed.
        UnfiredError: an op selected no row, and that was not allowed.
        NonFiniteError: a correction left the range of the model's dtype.
        BackendError: recorded rows are missing.
    """
    assert job.report is not None
    if capture is not None and writer is not None:
        selected = _selected(job, capture)
        for site in sites:
            _record(job, site, capture, selected, writer, config)
    doses = _doses(job, writer, config, allow_unfired)
    text = "" if tokenizer is None else str(tokenizer.decode(job.tokens, skip_special_tokens=True))
    return Generation(
        id=job.name,
        prompt_index=job.request.prompt_index,
        prompt_ids=job.prompt.ids,
        token_ids=tuple(job.tokens),
        text=text,
        logprobs=tuple(job.logprobs),
        top=tuple(job.top),
        stop=job.stop,
        doses=doses,
    )


def score(job: Job) -> Score:
    """Return the log-likelihood of a prompt.

    Raises:
        NotAppliedError, UnfiredError, NonFiniteError: as `finish`.
    """
    _doses(job, None, "", allow_unfired=False)
    found = job.output.prompt_logprobs or []
    pairs = zip(job.prompt.ids[1:], found[1:], strict=True)
    return Score(ids=job.prompt.ids, logprobs=tuple(values[token].logprob for token, values in pairs))


def _doses(job: Job, writer: Writer | None, config: str, allow_unfired: bool) -> tuple[DoseSummary, ...]:
    """Say what every op did; raises where one did not act as it should have."""
    assert job.report is not None
    if job.report.problems:
        raise NotAppliedError(f"request {job.name!r}: {job.report.problems[0]}")
    doses = tuple(_dose(job, one, writer, config, allow_unfired) for one in job.report.ops)
    _all_applied(job)
    return doses


def _selected(job: Job, capture: Capture) -> frozenset[int]:
    """Return the positions whose rows a capture has of a request."""
    ids = torch.tensor([*job.prompt.ids, *job.tokens])
    mask = Positions.parse(capture.positions).mask(torch.arange(len(ids)), job.length, ids)
    return frozenset(mask.nonzero()[:, 0].tolist())


def _record(job: Job, site: Site, capture: Capture, selected: frozenset[int], writer: Writer, config: str) -> None:
    assert job.report is not None
    steered = job.program is not None and site in job.program
    found = {one.edit: one for one in job.report.captured if one.site == site}
    chosen: list[tuple[str, CapturedRows | None]] = [(edit, found.get(edit)) for edit in capture.edit]
    if not steered:
        chosen = [("none", next((one for _, one in chosen if one is not None), None))]
    first = job.length - 1 if site.point == "logits" and not capture.prompt_logits else 0
    awaited = {position for position in selected if first <= position < _end(job, site)}
    for edit, one in chosen:
        keep = [] if one is None else [at for at, position in enumerate(one.positions) if position < _end(job, site)]
        lacking = awaited.difference(() if one is None else one.positions)
        if lacking:
            raise BackendError(
                f"request {job.name!r}: {site}: the engine recorded {len(awaited) - len(lacking)} of {len(awaited)} "
                f"rows ({edit}); position {min(lacking)} is missing"
            )
        if one is None or not keep:
            continue
        rows: Tensor = one.rows if len(keep) == len(one.positions) else one.rows[keep]
        writer.write(
            str(site),
            rows,
            site=str(site),
            layer=site.layer,
            phase="inference",
            edit=edit,
            config=config,
            prompt=job.request.prompt_index,
            request=job.name,
            positions=[one.positions[index] for index in keep],
            module_path=one.module_path,
            pp_rank=one.pp_rank,
        )


def _end(job: Job, site: Site) -> int:
    """Return the position that the rows of a site end before."""
    return job.length - 1 + len(job.tokens) if site.point == "logits" else job.rows


def _dose(job: Job, one: OpReport, writer: Writer | None, config: str, allow_unfired: bool) -> DoseSummary:
    assert job.report is not None
    assert job.program is not None
    site = Site.parse(one.site)
    number = int(one.op.partition(":")[0])
    step = job.program[site].steps[number]
    reason = ""
    if one.nonfinite:
        raise NonFiniteError(
            f"request {job.name!r}: {one.site}: {one.op} made {one.nonfinite} rows non-finite in the model's dtype and "
            "they were held in its range; lower the strength or use a model dtype of wider range"
        )
    if one.rows == 0:
        reason = "cached" if _all_cached(job, step.positions) else step.positions.unfired_reason(job.length, job.rows)
        if reason != "cached" and not allow_unfired:
            raise UnfiredError(
                f"request {job.name!r}: {one.op} at {one.site} selected no row: {reason}; positions {step.positions} "
                f"in a run of {job.rows} rows, {job.length} of them prompt; choose other positions, or accept it with "
                "allow_unfired=True"
            )
    measured = job.report.full.get((one.site, number))
    if measured is None:
        return DoseSummary(
            site=one.site,
            op=one.op,
            rows=one.rows,
            clamped=one.clamped,
            mean_projection_before=None,
            mean_projection_after=None,
            max_ratio=None,
            reason=reason,
        )
    return _measured(job, one, measured, writer, config, reason)


def _measured(
    job: Job, one: OpReport, measured: tuple[tuple[int, ...], Tensor], writer: Writer | None, config: str, reason: str
) -> DoseSummary:
    positions, values = measured
    table = [
        DoseRow(
            config=config,
            prompt=job.request.prompt_index,
            request=job.name,
            site=one.site,
            op=one.op,
            position=position,
            p_before=before,
            p_after=after,
            cap_delta=delta,
            clamped=bool(clamped),
            ratio=ratio,
        )
        for position, (before, after, delta, clamped, ratio) in zip(positions, values.tolist(), strict=True)
    ]
    if writer is not None:
        writer.write_dose(table)
    return DoseSummary(
        site=one.site,
        op=one.op,
        rows=one.rows,
        clamped=sum(row.clamped for row in table),
        mean_projection_before=math.fsum(row.p_before for row in table) / max(len(table), 1),
        mean_projection_after=math.fsum(row.p_after for row in table) / max(len(table), 1),
        max_ratio=max((row.ratio for row in table), default=None),
        reason=reason,
    )


def _all_cached(job: Job, positions: Any) -> bool:
    """Whether every row that a selection has came from the prefix cache."""
    assert job.report is not None
    cached = torch.arange(job.report.cached)
    ids = torch.tensor(job.prompt.ids[: job.report.cached], dtype=torch.int64)
    return bool(job.report.cached) and bool(positions.mask(cached, job.length, ids).any())


def _all_applied(job: Job) -> None:
    """Refuse a program of which some site never reported."""
    assert job.report is not None
    if job.program is None:
        return
    reported = {one.site for one in job.report.ops}
    silent = [site for site in job.program if str(site) not in reported]
    if silent:
        raise NotAppliedError(
            f"request {job.name!r}: nothing was reported from {silent[0]}; the engine does not steer there"
        )
    assert job.request.steering is not None
    if job.report.digest != job.request.steering.digest:
        acted = "none" if job.report.digest is None else job.report.digest[:16]
        raise BackendError(
            f"request {job.name!r}: the engine ran it with another steering ({acted}) than its own "
            f"({job.request.steering.digest[:16]})"
        )
