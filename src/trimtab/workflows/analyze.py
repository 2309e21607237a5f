"""Read a sweep, or two: token agreement, first divergence, drift, cap deltas, and one sentence of advice."""

from __future__ import annotations

import datetime
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    Recommendation,
    TokenAgreement,
)
from trimtab.results.analysis import SIGNIFICANT_DRIFT
from trimtab.workflows import _drift, _sweep_files
from trimtab.workflows._agreement import Tokens, explain, match
from trimtab.workflows._arguments import checked
from trimtab.workflows._drift import Side
from trimtab.workflows._recommend import recommend
from trimtab.workflows._sweep_files import PASSES, SweepFiles
from trimtab.workflows.config import SweepConfig


@checked
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
    reference = _Subject(reference_files, plan.config(reference_config or plan.reference))
    found = [candidate_files.plan.config(config)] if config else candidate_files.plan.configs
    chosen = [
        _Subject(candidate_files, one, f"{candidate_files.path.name}/" if one.label == reference.label else "")
        for one in found
        if run_b is not None or one.label != reference.label
    ]
    work = _Work(reference, _prompts(len(plan.prompts), prompt_idx))
    for one in chosen:
        work.compare(one)
    return _analysis(work, chosen, _command(run_a, run_b, prompt_idx, config, reference_config))


def _prompts(count: int, prompt_idx: int | None) -> tuple[int, ...]:
    if prompt_idx is None:
        return tuple(range(count))
    if not 0 <= prompt_idx < count:
        raise InputError(f"no prompt {prompt_idx} in this run; it has prompts 0 to {count - 1}")
    return (prompt_idx,)


@dataclass(frozen=True)
class _Subject:
    """One configuration of one sweep, with what it is called here."""

    files: SweepFiles
    config: SweepConfig
    prefix: str = ""
    """The run's name, where the reference has the same label."""

    @property
    def label(self) -> str:
        return self.prefix + self.config.label

    def read(self) -> tuple[pl.DataFrame, Side, list[str]]:
        """Return the tokens of the free pass, the forced pass, and what is wrong with either."""
        free, forced = (self.files.trace(self.config.label, which) for which in PASSES)
        problems = []
        for which, trace in zip(PASSES, (free, forced), strict=True):
            problems += [f"{self.label}: {problem}" for problem in trace.problems]
            made = int((self.files.done(self.config.label, which) or {})["tokens"])
            kept = int(trace.tokens["generated"].sum())
            if kept != made:
                problems.append(f"{self.label}: the {which} pass made {made} tokens and its trace holds {kept}")
        return free.tokens, Side(self.label, forced, forced.tokens), problems


@dataclass
class _Work:
    """Everything that was compared with one reference configuration."""

    reference: _Subject
    prompts: tuple[int, ...]
    agreements: list[TokenAgreement] = field(default_factory=list)
    drift: list[DriftCell] = field(default_factory=list)
    caps: list[CapStep] = field(default_factory=list)
    logprobs: list[LogprobStep] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    expected_rows: int = 0

    def __post_init__(self) -> None:
        self.free, self.side, self.problems = self.reference.read()
        self.layers = _drift.promised_layers(self.side.trace)
        self.names = _names(self.free)
        for prompt in self.prompts:
            self.caps += _drift.cap_steps(self.side, self.side, prompt, len(self.side.forced(prompt).ids))

    def compare(self, subject: _Subject) -> None:
        free, side, problems = subject.read()
        self.problems += problems
        names = self.names | _names(free)
        for prompt in self.prompts:
            self._compare_prompt(side, free, names, prompt)

    def _compare_prompt(self, side: Side, free: pl.DataFrame, names: dict[int, str], prompt: int) -> None:
        ours, theirs = self.side.forced(prompt), side.forced(prompt)
        steps = _drift.comparable_steps(ours, theirs)
        if steps < len(ours.ids):
            ended = steps == len(theirs.ids) and theirs.ids == ours.ids[:steps]
            why = f"ended after {steps} of {len(ours.ids)}" if ended else f"followed other tokens from step {steps} on"
            self.problems.append(
                f"{side.label}, prompt {prompt}: its forced pass {why}; {len(ours.ids) - steps} steps have no drift"
            )
        self.expected_rows += len(self.layers) * len(ours.ids)
        cells = list(_drift.drift_cells(self.side, side, prompt, self.layers, steps))
        missing = len(self.layers) * steps - len(cells)
        if missing:
            self.problems.append(
                f"{side.label}, prompt {prompt}: {missing} captured rows are missing here or in the reference"
            )
        logprobs = _drift.logprob_steps(self.side, side, prompt, steps, names)
        self.drift += cells
        self.logprobs += logprobs
        self.caps += _drift.cap_steps(self.side, side, prompt, steps)
        self.agreements.append(_agreement(side.label, prompt, self.free, free, cells, logprobs))


def _names(tokens: pl.DataFrame) -> dict[int, str]:
    return dict(zip(tokens["token_id"].to_list(), tokens["text"].to_list(), strict=True))


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
        explanation=f"the same tokens as far as both go, {at}"
        if at == min(len(ours.ids), len(theirs.ids))
        else explain(found, margin, statistics.median(margins) if margins else None, drift, _usual_shift(logprobs)),
    )


def _usual_shift(logprobs: Sequence[LogprobStep]) -> float | None:
    """How far a step moves a log-probability: the median over steps of the largest move among the shared tokens."""
    moves = [step.max_delta for step in logprobs if math.isfinite(step.max_delta)]
    return statistics.median(moves) if moves else None


def _analysis(work: _Work, chosen: Sequence[_Subject], command: str) -> Analysis:
    files = work.reference.files
    plan = files.plan
    others = [one.files.plan for one in chosen]
    rows = [_row(work, work.reference)] + [_row(work, one) for one in chosen]
    compared = len(work.drift)
    complete = not work.problems and compared == work.expected_rows > 0
    ledger = AnalysisLedger(
        expected_rows=work.expected_rows,
        compared_rows=compared,
        expected_prompts=len(chosen) * len(work.prompts),
        compared_prompts=len(work.agreements),
        problems=tuple(work.problems),
    )
    return Analysis(
        passed=complete,
        reason="everything expected was compared" if complete else _short(ledger),
        title="Precision sweep of a steered model" if plan.steering_digest else "Precision sweep",
        model=_both([plan.model, *(one.model for one in others)]),
        run=str(files.path),
        steering=_both([plan.steering, *(one.steering for one in others)]),
        steering_digest=plan.steering_digest,
        reference=work.reference.label,
        configs=tuple(rows),
        prompts=tuple(_prompt(work, index) for index in work.prompts),
        agreements=tuple(work.agreements),
        drift=tuple(work.drift),
        cap_steps=tuple(work.caps),
        logprobs=tuple(work.logprobs),
        recommendation=_recommendation(work, chosen, rows),
        ledger=ledger,
        num_layers=plan.num_layers,
        command=shlex.join(files.provenance.get("argv", [])),
        environment=_environment(files.provenance, plan.model_digest),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        next_command=_next(work, chosen, command),
    )


def _both(values: Sequence[str]) -> str:
    """Name what the reference's run had, and what the other run had where that differs."""
    different = dict.fromkeys(value for value in values[1:] if value != values[0])
    return f"{values[0]} (compared run: {', '.join(different)})" if different else values[0]


def _recommendation(work: _Work, chosen: Sequence[_Subject], rows: Sequence[ConfigRow]) -> Recommendation | None:
    plan = work.reference.files.plan
    if not all(one.files.plan.steering_digest for one in chosen):
        return None
    caps = all(one.startswith("Cap") for one in plan.steering.split("; "))
    return recommend(
        [replace(one.config, label=one.label) for one in chosen],
        rows,
        work.drift,
        reference=work.reference.label,
        op="cap" if caps else "op",
        seed=plan.seed,
    )


def _row(work: _Work, subject: _Subject) -> ConfigRow:
    config, label = subject.config, subject.label
    mine = [one for one in work.agreements if one.config == label]
    cells = [cell for cell in work.drift if cell.config == label]
    caps = [step for step in work.caps if step.config == label and step.can_clamp]
    divergences = [one.first_divergence for one in mine if one.first_divergence is not None]
    total = sum(len(one.reference_ids) for one in mine)
    equal = sum(a == b for one in mine for a, b in zip(one.reference_ids, one.ids, strict=False))
    ratio = equal / total if total else 1.0
    rel_l2_mean, rel_l2_max = _mean_max([cell.rel_l2 for cell in cells])
    mae_mean, mae_max = _mean_max([cell.mae for cell in cells])
    measured = subject.files.done(config.label, "free") or {}
    return ConfigRow(
        label=label,
        backend=config.backend,
        model_dtype=config.dtype,
        op_math=(config.dtype if config.op_math == "model" else config.op_math)
        if subject.files.plan.steering_digest
        else "none",
        is_reference=subject is work.reference,
        num_prompts=len(work.prompts),
        identical_prompts=len(work.prompts) - len(divergences),
        match_ratio=ratio,
        significant_drift=ratio < SIGNIFICANT_DRIFT,
        first_divergence=min(divergences, default=None),
        rel_l2_mean=rel_l2_mean,
        rel_l2_max=rel_l2_max,
        mae_mean=mae_mean,
        mae_max=mae_max,
        clamp_rate=statistics.fmean(step.clamped for step in caps) if caps else None,
        cap_delta_rms=statistics.fmean(step.cap_delta**2 for step in caps) ** 0.5 if caps else None,
        tokens_per_second=measured["tokens"] / measured["seconds"] if measured.get("seconds") else None,
    )


def _mean_max(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return statistics.fmean(values), math.nan if any(map(math.isnan, values)) else max(values)


def _prompt(work: _Work, index: int) -> PromptInfo:
    tokens = work.side.tokens.filter((pl.col("prompt") == index) & ~pl.col("generated")).sort("position")
    given = work.reference.files.plan.prompts[index]
    return PromptInfo(
        index=index, text=given if isinstance(given, str) else "".join(tokens["text"]), num_tokens=len(tokens)
    )


def _short(ledger: AnalysisLedger) -> str:
    if not ledger.compared_rows and not ledger.problems:
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


def _next(work: _Work, chosen: Sequence[_Subject], command: str) -> str:
    """Say where to look next: the worst prompt and configuration, or the report."""
    worst = min(work.agreements, key=lambda one: (one.match_ratio, one.first_divergence or 0), default=None)
    if worst is None or worst.first_divergence is None or "--prompt-idx" in command:
        return f"{command} --html report.html"
    label = next(one.config.label for one in chosen if one.label == worst.config)
    narrowed = command if " --config " in command else f"{command} --config {label}"
    return f"{narrowed} --prompt-idx {worst.prompt}"


def _command(
    run_a: str | Path, run_b: str | Path | None, prompt_idx: int | None, config: str | None, reference: str | None
) -> str:
    words = ["trimtab", "analyze", str(run_a), *([str(run_b)] if run_b else [])]
    for flag, value in (("--prompt-idx", prompt_idx), ("--config", config), ("--reference-config", reference)):
        words += [flag, str(value)] if value is not None else []
    return shlex.join(words)
