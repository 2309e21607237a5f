"""What the pages of a precision analysis say, as plain dataclasses: text and HTML render the same ones."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.results import Analysis, ConfigRow, Recommendation, TokenAgreement

BANDS = ("<0.01", "0.01-0.1", "0.1-1", ">1")
MAX_ROWS = 400
"""Rows of the table of prompts in a page; the JSON report holds all of them."""
_HIGHER_IS_BETTER = ("match", "identical", "agreement", "cosine")
_LOWER_IS_BETTER = ("rel_l2", "mae", "rmse", "drift", "ulp", "delta")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One of the three questions that the report exists for."""

    question: str
    short: str
    detail: str
    tone: str
    """"good", "bad" or "neutral": the mark beside the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalMark:
    """A paired interval on an axis from 0 to 100 (per cent of its width)."""

    estimate: float
    low: float
    high: float
    zero: float
    text: str
    metric: str
    worse: str
    better: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigLine:
    """One row of the table of configurations, formatted."""

    label: str
    is_reference: bool
    backend: str
    model_dtype: str
    op_math: str
    match: str
    match_percent: float
    significant_drift: bool
    identical: str
    first: str
    rel_l2: tuple[str, str]
    mae: tuple[str, str]
    bands: tuple[tuple[str, float, str], ...]
    """(band, share of cells in per cent, the share as text)."""
    clamp_rate: str
    cap_delta_rms: str
    speed: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLine:
    """One configuration and prompt: where its tokens part from the reference's, and why."""

    config: str
    prompt: int
    match: str
    significant_drift: bool
    first: int | None
    reference_token: str
    token: str
    margin: str
    smallest_margin: str
    drift_before: str
    length_delta: int
    explanation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisView:
    """Everything that a page about an `Analysis` says, in words and formatted numbers."""

    headline: str
    subtitle: str
    answers: tuple[Answer, ...]
    interval: IntervalMark | None
    configs: tuple[ConfigLine, ...]
    prompts: tuple[PromptLine, ...]
    prompts_left_out: int
    baseline: str
    alternative: str
    findings: dict[str, str]
    """One sentence per section, stating what its figure shows."""
    counts: tuple[tuple[str, str, str], ...]
    """(what, expected, compared) of the ledger."""


def view(analysis: Analysis) -> AnalysisView:
    """Read an analysis into sentences and table rows."""
    baseline = _baseline(analysis)
    lines = _prompt_lines(analysis)
    recommendation = analysis.recommendation
    return AnalysisView(
        headline=recommendation.sentence if recommendation else analysis.reason,
        subtitle=f"Model {analysis.model}. Steering: {analysis.steering}. Reference: {analysis.reference}.",
        answers=_answers(analysis, baseline),
        interval=_interval(recommendation) if recommendation else None,
        configs=tuple(_config_line(row, analysis) for row in analysis.configs),
        prompts=lines[:MAX_ROWS],
        prompts_left_out=max(0, len(lines) - MAX_ROWS),
        baseline=baseline.label if baseline else "",
        alternative=recommendation.alternative if recommendation else "",
        findings=_findings(analysis),
        counts=(
            ("prompts", f"{analysis.ledger.expected_prompts:,}", f"{analysis.ledger.compared_prompts:,}"),
            ("rows", f"{analysis.ledger.expected_rows:,}", f"{analysis.ledger.compared_rows:,}"),
        ),
    )


def _baseline(analysis: Analysis) -> ConfigRow | None:
    others = [row for row in analysis.configs if not row.is_reference]
    named = analysis.recommendation.baseline if analysis.recommendation else None
    return next((row for row in others if row.label == named), others[0] if others else None)


def _answers(analysis: Analysis, baseline: ConfigRow | None) -> tuple[Answer, ...]:
    if baseline is None:
        return ()
    same = baseline.identical_prompts == baseline.num_prompts
    earliest = min(
        (item for item in analysis.agreements if item.config == baseline.label and item.first_divergence is not None),
        key=lambda item: (item.first_divergence or 0, item.prompt),
        default=None,
    )
    answers = [
        Answer(
            question=f"Does {baseline.label} generate the same tokens as {analysis.reference}?",
            short="Yes, all of them" if same else f"No: {fmt.percent(baseline.match_ratio)} are equal",
            detail=f"{baseline.identical_prompts} of {fmt.count(baseline.num_prompts, 'prompt')} identical"
            + (", significant drift (under 90 %)" if baseline.significant_drift else ""),
            tone="good" if same else "bad",
        ),
        Answer(
            question="Where does it first differ?",
            short="Nowhere" if earliest is None else f"Token {earliest.first_divergence} of prompt {earliest.prompt}",
            detail="no token differs" if earliest is None else _where(earliest),
            tone="good" if earliest is None else "neutral",
        ),
    ]
    if analysis.recommendation is not None:
        answers.append(_third(analysis.recommendation))
    return tuple(answers)


def _where(item: TokenAgreement) -> str:
    reference, token = _pair(item)
    text = f"{reference!r} became {token!r}"
    if item.reference_margin is not None:
        text += f"; the reference's margin was {fmt.number(item.reference_margin)} nats"
    return text


def _third(item: Recommendation) -> Answer:
    interval = f"{item.alternative} minus {item.baseline}: {_difference(item, item.estimate)}"
    interval += f" [{_difference(item, item.low)}, {_difference(item, item.high)}]"
    detail = f"{interval}, {item.metric}, {fmt.percent(item.confidence)} interval, {fmt.count(item.num_pairs, 'pair')}"
    if not item.measurable:
        return Answer(question=item.question, short="No measurable difference", detail=detail, tone="neutral")
    sign = _direction(item.metric) * item.estimate
    short, tone = ("Yes", "good") if sign > 0 else ("No, it is worse", "bad") if sign < 0 else ("It differs", "neutral")
    return Answer(question=item.question, short=short, detail=detail, tone=tone)


def _direction(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where the name does not say."""
    name = metric.lower()
    if any(word in name for word in _LOWER_IS_BETTER):
        return -1
    return 1 if any(word in name for word in _HIGHER_IS_BETTER) else 0


def _difference(item: Recommendation, value: float) -> str:
    words = item.metric.lower().replace("_", " ").split()
    return fmt.points(value) if "ratio" in words or "rate" in words else fmt.signed(value)


def _interval(item: Recommendation) -> IntervalMark | None:
    if not all(math.isfinite(value) for value in (item.low, item.estimate, item.high)):
        return None
    reach = max(abs(item.low), abs(item.high), abs(item.estimate)) * 1.15 or 1.0

    def place(value: float) -> float:
        return round(50 + 50 * value / reach, 3)

    less, more = {1: ("worse", "better"), -1: ("better", "worse"), 0: ("less", "more")}[_direction(item.metric)]
    return IntervalMark(
        estimate=place(item.estimate),
        low=place(item.low),
        high=place(item.high),
        zero=place(0.0),
        text=f"{_difference(item, item.estimate)} [{_difference(item, item.low)}, {_difference(item, item.high)}]",
        metric=item.metric,
        worse=less,
        better=more,
    )


def _config_line(row: ConfigRow, analysis: Analysis) -> ConfigLine:
    cells = Counter(cell.band for cell in analysis.drift if cell.config == row.label)
    total = sum(cells.values())
    bands = tuple((band, 100 * cells[band] / total, fmt.percent(cells[band] / total)) for band in BANDS if total)
    return ConfigLine(
        label=row.label,
        is_reference=row.is_reference,
        backend=row.backend,
        model_dtype=row.model_dtype,
        op_math=row.op_math,
        match=fmt.percent(row.match_ratio),
        match_percent=round(100 * min(max(row.match_ratio, 0.0), 1.0), 2),
        significant_drift=row.significant_drift,
        identical=f"{row.identical_prompts} of {row.num_prompts}",
        first="none" if row.first_divergence is None else str(row.first_divergence),
        rel_l2=(fmt.number(row.rel_l2_mean), fmt.number(row.rel_l2_max)),
        mae=(fmt.number(row.mae_mean), fmt.number(row.mae_max)),
        bands=bands,
        clamp_rate=fmt.percent(row.clamp_rate),
        cap_delta_rms=fmt.number(row.cap_delta_rms),
        speed=fmt.number(row.tokens_per_second),
    )


def _pair(item: TokenAgreement) -> tuple[str, str]:
    """The two tokens at the first divergence; a run that stopped earlier shows "(end)"."""
    if item.first_divergence is None:
        return "", ""
    where = item.first_divergence
    return (
        item.reference_tokens[where] if where < len(item.reference_tokens) else "(end)",
        item.tokens[where] if where < len(item.tokens) else "(end)",
    )


def _prompt_lines(analysis: Analysis) -> tuple[PromptLine, ...]:
    """Diverging prompts first, earliest divergence first."""
    order = sorted(
        analysis.agreements,
        key=lambda item: (math.inf if item.first_divergence is None else item.first_divergence, item.prompt),
    )
    return tuple(
        PromptLine(
            config=item.config,
            prompt=item.prompt,
            match=fmt.percent(item.match_ratio),
            significant_drift=item.significant_drift,
            first=item.first_divergence,
            reference_token=_pair(item)[0],
            token=_pair(item)[1],
            margin=fmt.number(item.reference_margin),
            smallest_margin=fmt.number(item.smallest_margin),
            drift_before=fmt.number(item.drift_before),
            length_delta=item.length_delta,
            explanation=item.explanation,
        )
        for item in order
    )


def _findings(analysis: Analysis) -> dict[str, str]:
    others = [row for row in analysis.configs if not row.is_reference]
    flagged = [row.label for row in others if row.significant_drift]
    drifting = [row for row in others if row.rel_l2_mean is not None]
    found = {
        "configs": (
            f"Significant drift (under 90 % equal tokens): {', '.join(flagged)}."
            if flagged
            else "No configuration is under 90 % equal tokens."
        )
        if others
        else "There is no configuration beside the reference.",
    }
    if drifting:
        most = max(drifting, key=lambda row: row.rel_l2_mean or 0.0)
        found["drift"] = f"{most.label} drifts most: mean rel_l2 {fmt.number(most.rel_l2_mean)}" + _worst(
            analysis, most.label
        )
    diverging = [item for item in analysis.agreements if item.first_divergence is not None]
    found["divergence"] = (
        f"{len(diverging)} of {fmt.count(len(analysis.agreements), 'generation')} diverge from the reference."
    )
    same = Counter(item.config for item in analysis.logprobs if not item.same_top)
    if analysis.logprobs:
        total = Counter(item.config for item in analysis.logprobs)
        parts = [f"{label} {same[label]} of {total[label]:,}" for label in total]
        found["logprobs"] = f"Steps whose most likely token changed: {', '.join(parts)}."
    rates = [f"{row.label} {fmt.percent(row.clamp_rate)}" for row in analysis.configs if row.clamp_rate is not None]
    if rates:
        found["cap"] = f"Rows clamped: {', '.join(rates)}."
    return found


def _worst(analysis: Analysis, label: str) -> str:
    cells = [cell for cell in analysis.drift if cell.config == label and not math.isnan(cell.rel_l2)]
    if not cells:
        return "."
    worst = max(cells, key=lambda cell: cell.rel_l2)
    place = f"prompt {worst.prompt}, token {worst.step}, layer {worst.layer}"
    return f", at most {fmt.number(worst.rel_l2)} ({place})."
