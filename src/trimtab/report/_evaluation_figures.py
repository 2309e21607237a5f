"""The drawings of an evaluation: dose and response, effect against damage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from trimtab.report import _format as fmt
from trimtab.results.evaluation import DoseResponse, Evaluation, ParetoPoint

WIDTH, HEIGHT = 300.0, 150.0
SERIES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One group of variants in a panel."""

    name: str
    series: int
    """Colour; random controls are -1 and faint."""
    line: str
    band: str
    dots: tuple[tuple[float, float, str], ...]
    """(x, y, title)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A drawing on axes of its own."""

    title: str
    note: str
    curves: tuple[Curve, ...]
    zero: float | None
    """Height of the line of no effect, where it lies inside."""
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    description: str
    labels: tuple[tuple[float, float, str], ...] = ()
    """(x, y, text) beside points that stand out."""


def is_control(group: str) -> bool:
    """Whether a group of variants is a random direction."""
    return group.startswith("random-")


def interval(low: float, high: float) -> str:
    """Two ends in words; "-" where one is not known."""
    return f"{fmt.number(low)} to {fmt.number(high)}" if math.isfinite(low) and math.isfinite(high) else "-"


def dose_panels(result: Evaluation) -> list[Panel]:
    """One panel per scorer and unit of strength, all vectors on the same axes."""

    def key(one: DoseResponse) -> tuple[int, bool, str]:
        return result.scorers.index(one.scorer), one.group.endswith("@norm"), one.unit

    panels = []
    for (_, norms, unit), listed in groupby(sorted(result.dose_responses, key=key), key):
        doses = list(listed)
        xs = [point.scale for one in doses for point in one.points]
        ys = [value for one in doses for point in one.points for value in _ends(point.mean, point.low, point.high)]
        if len(set(xs)) < 2:
            continue
        across, down = _axis(min(xs), max(xs), 0.0, WIDTH), _axis(min(ys), max(ys), HEIGHT, 0.0)
        own = [one.group for one in doses if not is_control(one.group)]
        curves = tuple(
            _curve(one, own.index(one.group) % SERIES if one.group in own else -1, across, down) for one in doses
        )
        panels.append(
            Panel(
                title=doses[0].scorer,
                note="at matched norms" if norms else {"token_norm": "parts of each token's norm"}.get(unit, unit),
                curves=tuple(sorted(curves, key=lambda one: one.series)),
                zero=down(0.0) if min(ys) < 0 < max(ys) else None,
                x_ticks=tuple((across(x), f"{x:+.3g}" if x else "0") for x in _thin(sorted(set(xs)), across)),
                y_ticks=tuple((down(y), fmt.number(y)) for y in (min(ys), max(ys))),
                description=f"{doses[0].scorer} against strength for {', '.join(one.group for one in doses)}",
            )
        )
    return panels


def _curve(dose: DoseResponse, series: int, across: Callable[[float], float], down: Callable[[float], float]) -> Curve:
    places = [(across(point.scale), down(point.mean)) for point in dose.points]
    known = [point for point in dose.points if math.isfinite(point.low)]
    edge = [(across(point.scale), down(point.high)) for point in known]
    edge += [(across(point.scale), down(point.low)) for point in reversed(known)]
    return Curve(
        name=dose.group,
        series=series,
        line=_path(places),
        band=f"{_path(edge)}Z" if len(known) > 1 and series >= 0 else "",
        dots=tuple(
            (x, y, f"{dose.group} at {point.scale:+g}: {fmt.number(point.mean)}, {interval(point.low, point.high)}")
            for (x, y), point in zip(places, dose.points, strict=True)
        ),
    )


def tradeoffs(result: Evaluation) -> list[Panel]:
    """One panel per scorer: effect against perplexity, one point per variant."""
    panels = []
    for scorer in result.scorers:
        points = [
            one
            for one in result.pareto
            if one.scorer == scorer and math.isfinite(one.effect) and math.isfinite(one.damage)
        ]
        if len({(one.effect, one.damage) for one in points}) < 2:
            continue
        xs, ys = [one.damage for one in points], [one.effect for one in points]
        across, down = _axis(min(xs), max(xs), 0.0, WIDTH), _axis(min(ys), max(ys), HEIGHT, 0.0)

        def dots(listed: Sequence[ParetoPoint], name: str, series: int, x=across, y=down) -> Curve:  # type: ignore[no-untyped-def]
            places = tuple(
                (x(one.damage), y(one.effect), f"{one.variant}: effect {fmt.number(one.effect)}, perplexity x "
                 f"{fmt.number(one.damage)}") for one in listed
            )  # fmt: skip
            return Curve(name=name, series=series, line="", band="", dots=places)

        best = [one for one in points if one.efficient]
        panels.append(
            Panel(
                title=scorer,
                note="effect over unsteered, up; perplexity ratio, right",
                curves=(dots([one for one in points if not one.efficient], "others", -1), dots(best, "efficient", 0)),
                zero=down(0.0) if min(ys) < 0 < max(ys) else None,
                x_ticks=tuple((across(x), f"x {fmt.number(x)}") for x in (min(xs), max(xs))),
                y_ticks=tuple((down(y), fmt.number(y)) for y in (min(ys), max(ys))),
                description=f"effect on {scorer} against perplexity, one point per variant",
                labels=tuple((across(one.damage), down(one.effect), one.variant) for one in best[:6]),
            )
        )
    return panels


def _ends(*values: float) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def _thin(values: Sequence[float], across: Callable[[float], float]) -> list[float]:
    """Keep the ends and what has room between them."""
    kept = [values[0]]
    for value in values[1:-1]:
        if across(value) - across(kept[-1]) > 34 and across(values[-1]) - across(value) > 34:
            kept.append(value)
    return [*kept, values[-1]]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places) if places else ""
