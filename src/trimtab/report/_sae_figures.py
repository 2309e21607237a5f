"""The figures of the page of an evaluation of autoencoders: curves against L0, and histograms over latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.results.sae_evaluation import Measured, SAEScore

WIDTH, HEIGHT, BARS = 300.0, 150.0, 90.0
SERIES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One family in a panel."""

    name: str
    series: int
    line: str
    dots: tuple[tuple[float, float, float, float, str], ...]
    """(x, y, top and bottom of its interval, title)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A figure against L0."""

    title: str
    note: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Latents by some figure."""

    title: str
    note: str
    bars: tuple[tuple[float, float, float, str], ...]
    """(x, width, height, title)."""
    x_ticks: tuple[tuple[float, str], ...]
    peak: str
    description: str


def panels(scores: Sequence[SAEScore]) -> tuple[Panel, ...]:
    """FVU, and what the model loses, against L0; nothing for a single point."""
    shown = [one for one in scores if one.l0.value > 0]
    if len({one.l0.value for one in shown}) < 2:
        return ()
    readers: list[tuple[str, str, Callable[[SAEScore], Measured | None]]] = [
        ("FVU", "share of variance unexplained, lower is better", lambda one: one.fvu),
        ("delta CE", "nats lost per token, lower is better", lambda one: one.splice.delta_ce if one.splice else None),
        ("KL", "of the next token, nats, lower is better", lambda one: one.splice.kl if one.splice else None),
        ("CE recovered", "against zeros, higher is better", lambda one: one.splice.recovered if one.splice else None),
    ]
    made = (_panel(title, note, [(one, read(one)) for one in shown]) for title, note, read in readers)
    return tuple(panel for panel in made if panel is not None)


def _panel(title: str, note: str, pairs: Sequence[tuple[SAEScore, Measured | None]]) -> Panel | None:
    points = [(one, value) for one, value in pairs if value is not None and math.isfinite(value.value)]
    if len(points) < 2:
        return None
    xs = [one.l0.value for one, _ in points]
    ends = [end for _, value in points for end in (value.value, value.low, value.high) if math.isfinite(end)]
    across = _axis(math.log(min(xs)), math.log(max(xs)), 0.0, WIDTH)
    down = _axis(min(ends), max(ends), HEIGHT, 0.0)
    families = list(dict.fromkeys(one.family for one, _ in points))
    curves = []
    for series, family in enumerate(families):
        own = sorted((pair for pair in points if pair[0].family == family), key=lambda pair: pair[0].l0.value)
        dots = [_dot(one, value, title, across, down) for one, value in own]
        line = "M" + "L".join(f"{x:g} {y:g}" for x, y, *_ in dots)
        curves.append(Curve(name=family, series=series % SERIES, line=line, dots=tuple(dots)))
    places = _thin(sorted(set(xs)), lambda value: across(math.log(value)))
    return Panel(
        title=title,
        note=note,
        curves=tuple(curves),
        x_ticks=tuple((across(math.log(x)), fmt.number(x)) for x in places),
        y_ticks=tuple((down(y), fmt.number(y)) for y in (min(ends), max(ends))),
        description=f"{title} against L0 for {', '.join(families)}",
    )


def _dot(
    one: SAEScore, value: Measured, title: str, across: Callable[[float], float], down: Callable[[float], float]
) -> tuple[float, float, float, float, str]:
    known = math.isfinite(value.low) and math.isfinite(value.high)
    high, low = (value.high, value.low) if known else (value.value, value.value)
    text = f"{one.name}: {title} {fmt.number(value.value)} ({interval(value)}) at L0 {fmt.number(one.l0.value)}"
    return across(math.log(one.l0.value)), down(value.value), down(high), down(low), text


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low
    return lambda value: round(start + ((value - low) / span if span else 0.5) * (end - start), 1)


def _thin(values: Sequence[float], across: Callable[[float], float]) -> list[float]:
    """Keep the ends and what has room between them."""
    kept = [values[0]]
    for value in values[1:-1]:
        if across(value) - across(kept[-1]) > 34 and across(values[-1]) - across(value) > 34:
            kept.append(value)
    return [*kept, values[-1]]


def density(one: SAEScore) -> Histogram:
    parts = one.densities
    ticks = ((-6, "1e-6"), (-4, "1e-4"), (-2, "1e-2"), (0, "1"))
    dead = f"{parts.dead:,} dead ({fmt.percent(parts.dead_share)})"
    return _histogram("density", f"share of tokens, log axis; {dead}", parts.edges, parts.counts, ticks, log=True)


def cosines(one: SAEScore) -> Histogram:
    parts = one.decoder
    ticks = tuple((place, f"{place:g}") for place in (0.0, 0.5, 1.0))
    note = f"largest with another decoder row; {fmt.percent(parts.twins)} over 0.9"
    return _histogram("decoder cosine", note, parts.edges, parts.counts, ticks, log=False)


def _histogram(
    title: str,
    note: str,
    edges: Sequence[float],
    counts: Sequence[int],
    ticks: Sequence[tuple[float, str]],
    *,
    log: bool,
) -> Histogram:
    across = _axis(edges[0], edges[-1], 0.0, WIDTH)
    most = max(counts, default=0) or 1
    bars = []
    for left, right, number in zip(edges, edges[1:], counts, strict=False):
        if number:
            ends = tuple(f"1e{edge:g}" if log else f"{edge:g}" for edge in (left, right))
            text = f"{fmt.count(number, 'latent')}, {ends[0]} to {ends[1]}"
            bars.append(
                (across(left), across(right) - across(left) - 1, max(1.0, round(number / most * BARS, 1)), text)
            )
    return Histogram(
        title=title,
        note=note,
        bars=tuple(bars),
        x_ticks=tuple((across(place), label) for place, label in ticks),
        peak=fmt.number(max(counts, default=0)),
        description=f"histogram of {title} over {sum(counts):,} latents",
    )


def interval(one: Measured, digits: int = 3) -> str:
    """Return the interval in words; a dash where there is none."""
    if not (math.isfinite(one.low) and math.isfinite(one.high)):
        return fmt.MISSING
    return f"{fmt.number(one.low, digits)} to {fmt.number(one.high, digits)}"
