"""The numbers behind the figures of an analysis page, packed to fit one file.

A value per cell goes as base64 of little-endian float32, so a cell costs 5.4 bytes and infinities survive. Prompts are
added in order of their first divergence until `BUDGET` is spent; the page says how many it leaves out.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trimtab._base import jsonio
from trimtab.report._format import percent
from trimtab.results import Analysis, CapStep, DriftCell, LogprobStep, TokenAgreement

BUDGET = 1_050_000  # bytes of JSON; with the plotting bundle (1.5 MB) and the tables a page stays under 3 MB
PROMPT_CHARACTERS = 2000

_METRICS: tuple[tuple[str, str, Callable[[DriftCell], float]], ...] = (
    ("rel_l2", "relative L2", lambda cell: cell.rel_l2),
    ("mae", "MAE", lambda cell: cell.mae),
    ("rmse", "RMSE", lambda cell: cell.rmse),
    ("cosine", "1 - cosine", lambda cell: max(0.0, 1 - cell.cosine) if math.isfinite(cell.cosine) else math.nan),
    ("max_ulp", "max ULP", lambda cell: math.nan if cell.max_ulp is None else float(cell.max_ulp)),
)


def payload(analysis: Analysis) -> dict[str, Any]:
    """Return what the page's script draws from, as plain containers."""
    parts = _by_prompt(analysis)
    order = sorted(parts, key=lambda prompt: (_first(parts[prompt]["tokens"]), prompt))
    metrics, kept = _fit(parts, order)
    texts = {info.index: info.text for info in analysis.prompts}
    present = {cell.config for cell in analysis.drift} | {item.config for item in analysis.agreements}
    present |= {item.config for item in analysis.logprobs} | {item.config for item in analysis.cap_steps}
    return {
        "reference": analysis.reference,
        "baseline": analysis.recommendation.baseline if analysis.recommendation else "",
        "configs": [row.label for row in analysis.configs if not row.is_reference and row.label in present],
        "metrics": [{"key": key, "label": label} for key, label, _ in _METRICS if key in metrics],
        "left_out": {"prompts": len(order) - len(kept), "metrics": len(_METRICS) - len(metrics)},
        "ranges": {key: _range(read, analysis.drift) for key, _, read in _METRICS if key in metrics},
        "prompts": [
            {"index": prompt, "text": texts.get(prompt, "")[:PROMPT_CHARACTERS], **_encoded(parts[prompt], metrics)}
            for prompt in sorted(kept)
        ],
        "by_layer": _by_layer(analysis),
        "clamp_rate": _clamp_rate(analysis.cap_steps),
        "divergences": _divergences(analysis.agreements),
    }


def _by_prompt(analysis: Analysis) -> dict[int, dict[str, dict[str, list[Any]]]]:
    """Group all rows as prompt -> kind -> config -> rows."""
    parts: dict[int, dict[str, dict[str, list[Any]]]] = defaultdict(
        lambda: {kind: defaultdict(list) for kind in ("tokens", "drift", "cap", "logprobs")}
    )
    for kind, rows in (
        ("tokens", analysis.agreements),
        ("drift", analysis.drift),
        ("cap", analysis.cap_steps),
        ("logprobs", analysis.logprobs),
    ):
        for row in rows:
            parts[row.prompt][kind][row.config].append(row)
    return dict(parts)


def _first(tokens: dict[str, list[TokenAgreement]]) -> float:
    places = [item.first_divergence for rows in tokens.values() for item in rows]
    return min((place for place in places if place is not None), default=math.inf)


def _fit(parts: dict[int, Any], order: Sequence[int]) -> tuple[tuple[str, ...], list[int]]:
    """The metrics and prompts that fit the budget: fewer metrics first, then fewer prompts, at least one."""
    kept: list[int] = []
    metrics: tuple[str, ...] = ()
    for metrics in (tuple(key for key, _, _ in _METRICS), ("rel_l2", "mae"), ("rel_l2",)):
        kept, spent = [], 0
        for prompt in order:
            spent += len(jsonio.dumps(_encoded(parts[prompt], metrics)))
            if spent > BUDGET and kept:
                break
            kept.append(prompt)
        if len(kept) == len(order):
            break
    return metrics, kept


def _encoded(part: dict[str, dict[str, list[Any]]], metrics: Iterable[str]) -> dict[str, Any]:
    reference = max((item.reference_tokens for rows in part["tokens"].values() for item in rows), key=len, default=())
    return {
        "reference_tokens": list(reference),
        "tokens": {config: _tokens(rows[0]) for config, rows in part["tokens"].items()},
        "drift": {config: _drift(rows, metrics) for config, rows in part["drift"].items()},
        "cap": {config: _cap(rows) for config, rows in part["cap"].items()},
        "logprobs": {config: _logprobs(rows) for config, rows in part["logprobs"].items()},
    }


def _tokens(item: TokenAgreement) -> dict[str, Any]:
    return {
        "tokens": list(item.tokens),
        "first": item.first_divergence,
        "match": percent(item.match_ratio),
        "length_delta": item.length_delta,
        "margin": item.reference_margin,
        "smallest_margin": item.smallest_margin,
        "drift_before": item.drift_before,
        "explanation": item.explanation,
    }


def _drift(rows: list[DriftCell], metrics: Iterable[str]) -> dict[str, Any]:
    """A matrix layer x step; places without a row are marked in `missing`."""
    steps = sorted({cell.step for cell in rows})
    layers = sorted({cell.layer for cell in rows})
    found = {(cell.layer, cell.step): cell for cell in rows}
    grid = [found.get((layer, step)) for layer in layers for step in steps]
    wanted = set(metrics)
    return {
        "steps": steps,
        "layers": layers,
        "missing": [index for index, cell in enumerate(grid) if cell is None],
        "values": {
            key: pack([math.nan if cell is None else read(cell) for cell in grid])
            for key, _, read in _METRICS
            if key in wanted
        },
    }


def pack(values: Sequence[float]) -> str:
    """Encode floats as base64 of little-endian float32 (values past its range become infinite)."""
    return base64.b64encode(b"".join(_single(value) for value in values)).decode("ascii")


def _single(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", math.copysign(math.inf, value))


def _cap(rows: list[CapStep]) -> list[dict[str, Any]]:
    series: dict[tuple[str, str], list[CapStep]] = defaultdict(list)
    for row in rows:
        series[row.site, row.op].append(row)
    return [
        {
            "site": site,
            "op": op,
            "steps": [row.step for row in part],
            "before": [_short(row.projection_before) for row in part],
            "delta": [_short(row.cap_delta) for row in part],
            "reference": [_short(row.reference_cap_delta) for row in part],
            "clamped": [int(row.clamped) for row in part],
        }
        for (site, op), part in series.items()
    ]


def _logprobs(rows: list[LogprobStep]) -> dict[str, Any]:
    return {
        "steps": [row.step for row in rows],
        "reference_top": [row.reference_top for row in rows],
        "top": [row.top for row in rows],
        "shared": [row.shared for row in rows],
        "num_top": [row.num_top for row in rows],
        "delta_top": [_short(row.delta_top) for row in rows],
        "max_delta": [_short(row.max_delta) for row in rows],
        "margin": [_short(row.reference_margin) for row in rows],
    }


def _short(value: float | None) -> float | None:
    """Six significant digits: enough for a figure, half the bytes."""
    return value if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _range(read: Callable[[DriftCell], float], cells: Iterable[DriftCell]) -> list[float] | None:
    """Smallest and largest positive finite value: one colour scale for every configuration and prompt."""
    values = [value for value in map(read, cells) if math.isfinite(value) and value > 0]
    return [min(values), max(values)] if values else None


def _by_layer(analysis: Analysis) -> list[dict[str, Any]]:
    """Mean and maximum rel_l2 per configuration and layer, over all prompts and steps; finite rows only."""
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in analysis.drift:
        groups[cell.config][cell.layer].append(cell.rel_l2)
    series = []
    for config, layers in groups.items():
        finite = {layer: [v for v in layers[layer] if math.isfinite(v)] for layer in sorted(layers)}
        series.append(
            {
                "config": config,
                "layers": list(finite),
                "mean": [_short(sum(values) / len(values)) if values else None for values in finite.values()],
                "max": [_short(max(values, default=math.nan)) for values in finite.values()],
                "nonfinite": [len(layers[layer]) - len(values) for layer, values in finite.items()],
            }
        )
    return series


def _clamp_rate(rows: Iterable[CapStep]) -> list[dict[str, Any]]:
    """Share of clamped rows per configuration and step, over all prompts, sites and ops with bounds."""
    groups: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.can_clamp:
            groups[row.config][row.step].append(row.clamped)
    return [
        {
            "config": config,
            "steps": sorted(steps),
            "rate": [_short(sum(steps[step]) / len(steps[step])) for step in sorted(steps)],
            "rows": [len(steps[step]) for step in sorted(steps)],
        }
        for config, steps in groups.items()
    ]


def _divergences(agreements: Iterable[TokenAgreement]) -> list[dict[str, Any]]:
    return [
        {
            "config": item.config,
            "prompt": item.prompt,
            "step": item.first_divergence,
            "margin": item.reference_margin,
            "drift": item.drift_before,
        }
        for item in agreements
        if item.first_divergence is not None
    ][:2000]
