"""Read a sweep, or two: token agreement, first divergence, drift, cap deltas, and one sentence of advice."""

from __future__ import annotations

import datetime
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from trimtab.errors import InputError
from trimtab.results import (
    Analysis,
    AnalysisLedger,
    CapStep,
    ConfigRow,
    DriftCell,
    LogprobStep,
    PromptInfo,
    TokenAgreement,
)
from trimtab.results.analysis import SIGNIFICANT_DRIFT
from trimtab.workflows import _drift, _sweep_files
from trimtab.workflows._agreement import Match, Tokens, explain, match
from trimtab.workflows._drift import Side
from trimtab.workflows._recommend import recommend
from trimtab.workflows._sweep_files import SweepFiles
from trimtab.workflows.config import SweepConfig


def analyze(
    run_a: str | Path,
    run_b: str | Path | None = None,
    *,
    prompt_idx: int | None = None,
    config: str | None = None,
    reference_config: str | None = None,
) -> Analysis:
    """Compare the configurations of a sweep with its reference, or a configuration of another sweep with it.

    Args:
        run_a: directory of a sweep.
        run_b: a second sweep over the same prompts; its `config` is compared with `reference_config` of `run_a`.
        prompt_idx: this prompt only, counted from 0.
        config: this configuration only; with `run_b` None takes every configuration of it.
        reference_config: compare with this configuration; None takes the reference of `run_a`.

    Returns:
        The analysis; `passed` says that everything expected was compared, not that nothing differs.

    Raises:
        InputError: no sweep there, or no such prompt or configuration.
        UnfinishedError: a pass that is needed is not complete.
        ComparisonError: the two sweeps ran different prompts.
    """
    reference_files = _sweep_files.load(run_a)
    candidate_files = reference_files if run_b is None else _sweep_files.load(run_b)
    _sweep_files.check_same_prompts(reference_files, candidate_files)
    plan = reference_files.plan
    reference = plan.config(reference_config or plan.reference)
    chosen = [candidate_files.plan.config(config)] if config else list(candidate_files.plan.configs)
    if run_b is None:
        chosen = [one for one in chosen if one.label != reference.label]
    prompts = _prompts(len(plan.prompts), prompt_idx)
    work = _Work(reference_files, reference, prompts)
    for one in chosen:
        work.compare(candidate_files, one)
    return _analysis(work, candidate_files, chosen, _command(run_a, run_b, prompt_idx, config, reference_config))


def _prompts(count: int, prompt_idx: int | None) -> tuple[int, ...]:
    if prompt_idx is None:
        return tuple(range(count))
    if not 0 <= prompt_idx < count:
        raise InputError(f"no prompt {prompt_idx} in this run; it has prompts 0 to {count - 1}")
    return (prompt_idx,)


@dataclass
class _Work:
    """Everything that was compared with one reference configuration."""

    files: SweepFiles
    reference: SweepConfig
    prompts: tuple[int, ...]
    agreements: list[TokenAgreement] = field(default_factory=list)
    drift: list[DriftCell] = field(default_factory=list)
    caps: list[CapStep] = field(default_factory=list)
    logprobs: list[LogprobStep] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    expected_rows: int = 0

    def __post_init__(self) -> None:
        label = self.reference.label
        self.free = self.files.trace(label, "free").tokens
        forced = self.files.trace(label, "forced")
        self.side = Side(label, forced, forced.tokens)
        self.names = dict(zip(self.free["token_id"].to_list(), self.free["text"].to_list(), strict=True))
        for prompt in self.prompts:
            self.caps += _drift.cap_steps(self.side, self.side, prompt, len(self.side.forced(prompt).ids))

    def compare(self, files: SweepFiles, config: SweepConfig) -> None:
        free = files.trace(config.label, "free").tokens
        forced = files.trace(config.label, "forced")
        side = Side(config.label, forced, forced.tokens)
        self.problems += [f"{config.label}: {problem}" for problem in forced.problems]
        names = self.names | dict(zip(free["token_id"].to_list(), free["text"].to_list(), strict=True))
        for prompt in self.prompts:
            self._compare_prompt(side, free, names, prompt)

    def _compare_prompt(self, side: Side, free: pl.DataFrame, names: dict[int, str], prompt: int) -> None:
        ours, theirs = self.side.forced(prompt), side.forced(prompt)
        steps = _drift.comparable_steps(ours, theirs)
        if steps < len(ours.ids):
            self.problems.append(
                f"{side.label}, prompt {prompt}: its forced pass followed other tokens from step {steps} on; "
                f"{len(ours.ids) - steps} steps have no drift"
            )
        layers = self.files.plan.num_layers
        self.expected_rows += layers * len(ours.ids)
        cells = list(_drift.drift_cells(self.side, side, prompt, layers, steps))
        if len(cells) < layers * steps:
            self.problems.append(
                f"{side.label}, prompt {prompt}: {layers * steps - len(cells)} captured rows are missing"
            )
        logprobs = _drift.logprob_steps(self.side, side, prompt, steps, names)
        self.drift += cells
        self.logprobs += logprobs
        self.caps += _drift.cap_steps(self.side, side, prompt, steps)
        self.agreements.append(_agreement(side.label, prompt, self.free, free, cells, logprobs))


def _agreement(
    label: str,
    prompt: int,
    reference: pl.DataFrame,
    candidate: pl.DataFrame,
    cells: Sequence[DriftCell],
    logprobs: Sequence[LogprobStep],
) -> TokenAgreement:
    ours, theirs = Tokens.of(reference, prompt), Tokens.of(candidate, prompt)
    found = match(ours.ids, theirs.ids)
    at = found.first_divergence
    margins = [margin for step in range(len(ours.ids)) if (margin := ours.margin(step)) is not None]
    until = margins if at is None else margins[: at + 1]
    last = max((cell.layer for cell in cells), default=None)
    drift = next((cell.rel_l2 for cell in cells if cell.layer == last and cell.step == at), None)
    margin = None if at is None else ours.margin(at)
    return TokenAgreement(
        config=label,
        prompt=prompt,
        reference_tokens=ours.texts,
        tokens=theirs.texts,
        reference_ids=ours.ids,
        ids=theirs.ids,
        match_ratio=found.ratio,
        first_divergence=at,
        length_delta=found.length_delta,
        significant_drift=found.significant,
        reference_margin=margin,
        smallest_margin=min(until, default=None),
        drift_before=drift,
        explanation=explain(
            found, margin, statistics.median(margins) if margins else None, drift, _shift(found, ours, theirs, logprobs)
        ),
    )


def _shift(found: Match, ours: Tokens, theirs: Tokens, logprobs: Sequence[LogprobStep]) -> float | None:
    """How far precision moved the gap between the reference's choice and the candidate's, at the divergence."""
    at = found.first_divergence
    if at is None or at >= min(len(ours.ids), len(theirs.ids)):
        return None
    mine = dict(zip(ours.top_ids[at], ours.top_logprobs[at], strict=True))
    other = dict(zip(theirs.top_ids[at], theirs.top_logprobs[at], strict=True))
    pair = (ours.ids[at], theirs.ids[at])
    if all(one in mine and one in other for one in pair):
        return abs((mine[pair[0]] - mine[pair[1]]) - (other[pair[0]] - other[pair[1]]))
    return next((step.max_delta for step in logprobs if step.step == at), None)


def _analysis(work: _Work, files: SweepFiles, chosen: Sequence[SweepConfig], command: str) -> Analysis:
    plan = work.files.plan
    rows = [_row(work, work.files, work.reference, reference=True)] + [_row(work, files, one) for one in chosen]
    compared = len(work.drift)
    complete = not work.problems and compared == work.expected_rows and bool(work.agreements)
    ledger = AnalysisLedger(
        expected_rows=work.expected_rows,
        compared_rows=compared,
        expected_prompts=len(chosen) * len(work.prompts),
        compared_prompts=len(work.agreements),
        problems=tuple(work.problems),
    )
    record = work.files.provenance
    return Analysis(
        passed=complete,
        reason="everything expected was compared" if complete else _short(ledger),
        title="Precision sweep of a steered model" if plan.steering_digest else "Precision sweep",
        model=plan.model,
        run=str(work.files.path),
        steering=plan.steering,
        steering_digest=plan.steering_digest,
        reference=work.reference.label,
        configs=tuple(rows),
        prompts=tuple(_prompt(work, index) for index in work.prompts),
        agreements=tuple(work.agreements),
        drift=tuple(work.drift),
        cap_steps=tuple(work.caps),
        logprobs=tuple(work.logprobs),
        recommendation=recommend(
            [work.reference, *chosen],
            rows,
            work.drift,
            reference=work.reference.label,
            op="cap" if plan.steering.startswith("Cap") else "op",
            seed=plan.seed,
        ),
        ledger=ledger,
        num_layers=plan.num_layers,
        command=shlex.join(record.get("argv", [])),
        environment=_environment(record, plan.model_digest),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        next_command=_next(work, command),
    )


def _row(work: _Work, files: SweepFiles, config: SweepConfig, *, reference: bool = False) -> ConfigRow:
    mine = [one for one in work.agreements if one.config == config.label] if not reference else []
    cells = [cell for cell in work.drift if cell.config == config.label] if not reference else []
    caps = [step for step in work.caps if step.config == config.label]
    divergences = [one.first_divergence for one in mine if one.first_divergence is not None]
    total = sum(len(one.reference_ids) for one in mine)
    equal = sum(one.match_ratio * len(one.reference_ids) for one in mine)
    ratio = equal / total if total else 1.0
    measured = files.done(config.label, "free") or {}
    return ConfigRow(
        label=config.label,
        backend=config.backend,
        model_dtype=config.dtype,
        op_math=(config.dtype if config.op_math == "model" else config.op_math)
        if files.plan.steering_digest
        else "none",
        is_reference=reference,
        num_prompts=len(work.prompts),
        identical_prompts=len(work.prompts) - len(divergences),
        match_ratio=ratio,
        significant_drift=ratio < SIGNIFICANT_DRIFT,
        first_divergence=min(divergences, default=None),
        rel_l2_mean=statistics.fmean(cell.rel_l2 for cell in cells) if cells else None,
        rel_l2_max=max((cell.rel_l2 for cell in cells), default=None),
        mae_mean=statistics.fmean(cell.mae for cell in cells) if cells else None,
        mae_max=max((cell.mae for cell in cells), default=None),
        clamp_rate=statistics.fmean(step.clamped for step in caps) if caps else None,
        cap_delta_rms=statistics.fmean(step.cap_delta**2 for step in caps) ** 0.5 if caps else None,
        tokens_per_second=measured["tokens"] / measured["seconds"] if measured.get("seconds") else None,
    )


def _prompt(work: _Work, index: int) -> PromptInfo:
    tokens = work.side.forced(index)
    return PromptInfo(
        index=index, text=work.files.plan.prompts[index], num_tokens=tokens.positions[0] if tokens.positions else 0
    )


def _short(ledger: AnalysisLedger) -> str:
    if not ledger.compared_prompts:
        return "nothing was compared"
    return f"{ledger.compared_rows} of {ledger.expected_rows} rows compared; " + "; ".join(ledger.problems[:3])


def _environment(record: dict[str, Any], model_digest: str) -> dict[str, str]:
    packages = record.get("packages", {})
    settings = record.get("torch_settings", {})
    lines = {
        **{name: str(version) for name, version in packages.items()},
        "python": record.get("python", ""),
        "platform": record.get("platform", ""),
        "processors": str(record.get("cpu_count", "")),
        "threads": str(settings.get("num_threads", "")),
        "float32 matmul precision": settings.get("float32_matmul_precision", ""),
        "weights digest": model_digest,
        "commit": (record.get("git_commit") or "") + (" with changes" if record.get("git_dirty") else ""),
        "run at": record.get("created", ""),
        **record.get("environment", {}),
    }
    return {key: value for key, value in lines.items() if value}


def _next(work: _Work, command: str) -> str:
    worst = min(work.agreements, key=lambda one: (one.match_ratio, one.first_divergence or 0), default=None)
    if worst is None or worst.first_divergence is None:
        return f"trimtab report {work.files.path} --out report.html"
    return (
        f"{command} --prompt-idx {worst.prompt} --config {worst.config}" if "--prompt-idx" not in command else command
    )


def _command(
    run_a: str | Path, run_b: str | Path | None, prompt_idx: int | None, config: str | None, reference: str | None
) -> str:
    words = ["trimtab", "analyze", str(run_a), *([str(run_b)] if run_b else [])]
    for flag, value in (("--prompt-idx", prompt_idx), ("--config", config), ("--reference-config", reference)):
        words += [flag, str(value)] if value is not None else []
    return shlex.join(words)
