"""The rules that judge a measured pair: calibrated, fixed thresholds, rules per tensor, published scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trimtab.compare._measured import Floats, Measured, energy, relative_rows
from trimtab.compare._verdict_kinds import SCALES, Calibrated, Fixed, Rules, Scale, Verdict, parse_verdict
from trimtab.compare.rounding import Expected
from trimtab.compare.rules import Lookup, Rule
from trimtab.results.comparison import Calibration, Metrics, Status

__all__ = [
    "SCALES",
    "Calibrated",
    "Fixed",
    "Judgement",
    "Probe",
    "Rules",
    "Scale",
    "Verdict",
    "calibrate",
    "judge",
    "lookup",
    "parse_verdict",
]


class Probe(Protocol):
    """Measurements that need another pass over the pair; made only when a verdict asks."""

    def channels(self) -> tuple[Floats, Floats]:
        """Per channel of the last dimension: slope - 1, and mean error over the channel's rms."""

    def channel_rms(self, most: int | None = None) -> Floats:
        """The reference's rms by channel, over all rows or over at most `most` evenly spread ones."""

    def max_ulp(self) -> int | None:
        """Largest distance in representable steps of the coarser dtype; None when a side is not finite."""

    def quantiles(self) -> tuple[float, ...]:
        """|a - r| at 0.5, 0.9, 0.99 and 0.999."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """Status of one pair and why."""

    status: Status
    reasons: tuple[str, ...] = ()
    calibration: Calibration | None = None
    severity: str | None = None


_BANDS = ((1e-7, "identical"), (1e-5, "equivalent"), (1e-3, "minor"), (1e-1, "significant"), (math.inf, "severe"))


def judge(
    verdict: Verdict, measured: Measured, expected: Expected, probe: Probe, *, rule: Rule | None, layer: int | None
) -> Judgement:
    """Judge one pair.

    Args:
        verdict: the default rule.
        measured: what the fused pass found.
        expected: the error that rounding explains.
        probe: further measurements, made when needed.
        rule: the per-tensor rule that matched this tensor; it takes the place of the default.
        layer: for predicates that use it.
    """
    metrics = measured.metrics
    if measured.mismatch is not None:
        return Judgement(status="failed", reasons=(measured.mismatch,))
    if measured.exact:
        return _judge_exact(metrics)
    if rule is not None:
        return _judge_rule(rule, lookup(measured, expected, probe, layer))
    if isinstance(verdict, Calibrated):
        return calibrate(verdict, measured, expected, probe)
    if isinstance(verdict, Fixed):
        return _judge_fixed(verdict, lookup(measured, expected, probe, layer))
    if isinstance(verdict, Scale):
        return _judge_scale(verdict, metrics)
    return Judgement(status="failed", reasons=("no rule matches this tensor; add one, or end with '.*: ...'",))


def calibrate(limits: Calibrated, measured: Measured, expected: Expected, probe: Probe) -> Judgement:
    """The calibrated verdict; see `Calibrated`."""
    metrics, e = measured.metrics, expected.error
    relative = _ordered(_relative(measured, expected))
    moved = relative if relative.size and relative[0] > 0 else _ordered(relative[relative > 0])
    if moved.size == 0:
        return Judgement(status="passed", calibration=_calibration(limits, expected))
    rows = int(relative.size)
    ratios = [float(one) / e if e > 0 else math.inf * (one > 0) for one in (_middle(relative), relative[-1])]
    spread = math.sqrt(2 * math.log(rows)) if rows > 1 else 1.0
    above_underflow = _rms(measured) > _smallest(expected)
    found = _calibration(
        limits,
        expected,
        median=ratios[0],
        worst=ratios[1],
        worst_limit=limits.worst * max(spread, 1.0),
        element=_element_ratio(limits, measured, expected, probe),
        element_limit=limits.element * math.sqrt(2 * math.log(max(metrics.numel, 2))),
        slope_deviation=abs(metrics.slope - 1) if above_underflow else 0.0,
        mean_deviation=_mean_deviation(measured) if above_underflow else 0.0,
        channel=_channel_ratio(measured, expected, probe),
        channel_limit=limits.worst * math.sqrt(2 * math.log(max(measured.width, 2))),
        systematic_limit=max(
            limits.systematic * _middle(moved) / math.sqrt(min(rows, measured.width, 1024)),
            expected.common,
        ),
        probe=probe,
    )
    reasons = _reasons(found)
    if found.systematic or found.excess > limits.fail:
        return Judgement(status="failed", reasons=reasons, calibration=found)
    return Judgement(status="inconclusive" if found.excess > 1 else "passed", reasons=reasons, calibration=found)


def lookup(measured: Measured, expected: Expected, probe: Probe, layer: int | None) -> Lookup:
    """Values of the variables of predicates (`rules.VARIABLES`) for one pair."""
    metrics = measured.metrics

    def value(name: str) -> float:
        if name in ("noise_ratio", "worst_noise_ratio"):
            ratio = _over(_relative(measured, expected), expected.error)
            return 0.0 if ratio.size == 0 else float(np.median(ratio) if name == "noise_ratio" else ratio.max())
        if name == "ulp":
            ulp = probe.max_ulp()
            return math.nan if ulp is None else float(ulp)
        if name in _QUANTILES:
            return probe.quantiles()[_QUANTILES.index(name)]
        if name == "layer":
            return math.nan if layer is None else float(layer)
        return float(getattr(metrics, _RENAMED.get(name, name)))

    return value


_SAMPLE_ROWS = 64
_SORTED = 1024
_CONCENTRATED = 0.125  # participation ratio of the channels' energies below which few channels hold the norm
_QUANTILES = ("p50", "p90", "p99", "p999")
_RENAMED = {"worst_row": "worst_row_error", "worst_channel": "worst_channel_rms"}


def _judge_exact(metrics: Metrics) -> Judgement:
    if not metrics.differing:
        return Judgement(status="passed")
    reason = (
        f"{metrics.differing} of {metrics.numel} integers differ, most at {list(metrics.max_abs_index)}: "
        f"{metrics.max_abs_reference} against {metrics.max_abs_candidate}"
    )
    return Judgement(status="failed", reasons=(reason,))


def _judge_rule(rule: Rule, values: Lookup) -> Judgement:
    holds = rule.predicate.holds(values)
    said = rule.predicate.explain(values)
    return Judgement(status="passed" if holds else "failed", reasons=() if holds else (f"rule {rule.pattern}: {said}",))


def _judge_fixed(fixed: Fixed, values: Lookup) -> Judgement:
    reasons = []
    for name, bound in fixed.bounds().items():
        value = values(name)
        if not (value >= bound if name == "cosine_min" else value <= bound):
            reasons.append(f"{name} {value:.6g} {'below' if name == 'cosine_min' else 'above'} {bound:g}")
    return Judgement(status="failed" if reasons else "passed", reasons=tuple(reasons))


def _judge_scale(scale: Scale, metrics: Metrics) -> Judgement:
    if scale.name == "msprobe":
        ok = metrics.max_abs == 0 or (metrics.cosine > 0.99 and metrics.max_abs < 1e-3)
        said = f"cosine {metrics.cosine:.6g}, max_abs {metrics.max_abs:.6g}"
        severity = "within" if ok else "outside"
    elif scale.name == "sglang":
        ok = metrics.rel_diff <= 1e-3
        said, severity = f"rel_diff {metrics.rel_diff:.6g}", "within" if ok else "outside"
    else:
        severity = next(band for bound, band in _BANDS if metrics.rel_diff < bound or bound == math.inf)
        ok = severity not in ("significant", "severe")
        said = f"rel_diff {metrics.rel_diff:.6g} is {severity}"
    return Judgement(status="passed" if ok else "failed", reasons=() if ok else (said,), severity=severity)


def _relative(measured: Measured, expected: Expected) -> Floats:
    """Row errors over the larger of the row's norm and what underflow makes of a row of zeros."""
    return relative_rows(measured.row_error, measured.row_norm, math.sqrt(measured.width) * _smallest(expected))


def _ordered(values: Floats) -> Floats:
    """Values with the smallest, the middle and the largest in place; sorting many takes three times as long."""
    if values.size <= _SORTED:
        return np.sort(values)
    last = values.size - 1
    return np.partition(values, (0, last // 2, (last + 1) // 2, last))


def _middle(ordered: Floats) -> float:
    """Median of ordered values."""
    half = ordered.size // 2
    return float(ordered[half] if ordered.size % 2 else (ordered[half - 1] + ordered[half]) / 2)


def _smallest(expected: Expected) -> float:
    """Size of an element below which its rounding no longer shrinks with it."""
    return expected.underflow / expected.error if expected.error > 0 else 0.0


def _over(relative: Floats, e: float) -> Floats:
    if e > 0:
        return relative / e
    return np.where(relative > 0, np.inf, 0.0)


def _element_ratio(limits: Calibrated, measured: Measured, expected: Expected, probe: Probe) -> float:
    """Worst element over e times its scale; the channel's rms is read only when the row's does not excuse it."""
    metrics, e = measured.metrics, expected.error
    row, channel = divmod(measured.worst_flat, measured.width)
    rms_row = float(measured.row_norm[row]) / math.sqrt(measured.width)
    rms_all = math.sqrt(energy(measured.row_norm) / measured.row_norm.size / measured.width)
    scale = max(abs(float(metrics.max_abs_reference)), rms_row, 0.01 * rms_all, _smallest(expected))
    limit = limits.element * math.sqrt(2 * math.log(max(metrics.numel, 2)))
    if e == 0:
        return math.inf if metrics.max_abs > 0 else 0.0
    if scale == 0 or metrics.max_abs / (e * scale) > limit:
        scale = max(scale, float(probe.channel_rms()[channel]))
    return math.inf if scale == 0 else metrics.max_abs / (e * scale)


def _channel_ratio(measured: Measured, expected: Expected, probe: Probe) -> float:
    """Worst channel's error over e times its own rms, where few channels hold the norm; 0 elsewhere.

    A massive channel sets the norm of every row and hides all others behind it. Elsewhere rows say it better: a channel
    that happens to be small has the error of its row.
    """
    if measured.channel_error.size < 8 or not measured.channel_error.any():
        return 0.0
    energies = probe.channel_rms(_SAMPLE_ROWS) ** 2
    total = float(energies.sum())
    if total == 0 or total**2 >= _CONCENTRATED * energies.size * energy(energies):
        return 0.0
    rms = probe.channel_rms()
    # The elements of a single row are no channels: one that is small because its terms cancel has the error of others.
    least = 0.1 if measured.row_norm.size > 1 else 1.0
    scale = np.maximum(rms, max(least * float(np.median(rms)), _smallest(expected)))
    moved = measured.channel_error > 0
    with np.errstate(divide="ignore"):
        return float(np.max(measured.channel_error[moved] / (expected.error * scale[moved])))


def _mean_deviation(measured: Measured) -> float:
    rms, difference = _rms(measured), abs(measured.mean_error)
    return difference / rms if rms > 0 else (math.inf if difference > 0 else 0.0)


def _rms(measured: Measured) -> float:
    return math.sqrt(energy(measured.row_norm) / max(measured.metrics.numel, 1))


def _shared(deviations: Floats, least: float) -> float:
    """Median of per-channel deviations over its standard error (by median absolute deviation); 0 below `least`."""
    finite = deviations[np.isfinite(deviations)]
    if finite.size < 8 or abs(float(np.median(finite))) <= least:
        return 0.0
    middle = float(np.median(finite))
    error = 1.2533 * 1.4826 * float(np.median(np.abs(finite - middle))) / math.sqrt(finite.size)
    return abs(middle) / error if error > 0 else math.inf


def _calibration(
    limits: Calibrated,
    expected: Expected,
    *,
    median: float = 0.0,
    worst: float = 0.0,
    worst_limit: float | None = None,
    element: float = 0.0,
    element_limit: float | None = None,
    channel: float = 0.0,
    channel_limit: float | None = None,
    slope_deviation: float = 0.0,
    mean_deviation: float = 0.0,
    systematic_limit: float = 0.0,
    probe: Probe | None = None,
) -> Calibration:
    worst_limit = limits.worst if worst_limit is None else worst_limit
    element_limit = limits.element if element_limit is None else element_limit
    channel_limit = limits.worst if channel_limit is None else channel_limit
    systematic = False
    if probe is not None and max(slope_deviation, mean_deviation) > systematic_limit:
        slopes, means = probe.channels()
        systematic = (slope_deviation > systematic_limit and _shared(slopes, systematic_limit) > limits.shared) or (
            mean_deviation > systematic_limit and _shared(means, 0.0) > limits.shared
        )
    return Calibration(
        expected=expected.error,
        source=expected.source,
        dtype=expected.dtype,
        blocks=expected.blocks,
        median=median,
        median_limit=limits.median,
        worst=worst,
        worst_limit=worst_limit,
        slope_deviation=slope_deviation,
        slope_limit=systematic_limit,
        mean_deviation=mean_deviation,
        mean_limit=systematic_limit,
        element=element,
        element_limit=element_limit,
        channel=channel,
        channel_limit=channel_limit,
        systematic=systematic,
        excess=max(median / limits.median, worst / worst_limit, element / element_limit, channel / channel_limit),
    )


def _reasons(found: Calibration) -> tuple[str, ...]:
    reasons = []
    for name, value, limit in (
        ("median row error", found.median, found.median_limit),
        ("worst row error", found.worst, found.worst_limit),
        ("worst element", found.element, found.element_limit),
        ("worst channel error", found.channel, found.channel_limit),
    ):
        if value > limit:
            reasons.append(f"{name} {value:.3g} times the expected {found.dtype} rounding (limit {limit:.3g})")
    if found.systematic:
        reasons.append(
            f"systematic: slope - 1 = {found.slope_deviation:.3g}, mean shift {found.mean_deviation:.3g} rms "
            f"(limit {found.slope_limit:.3g}), shared by the channels"
        )
    return tuple(reasons)
