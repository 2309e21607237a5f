"""What the page of the scaling test says: curves over the sample size, with the knee; text and HTML from one view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.report import _html
from trimtab.report._console import TextPage
from trimtab.results.stress import MethodCurve, Stress, StressPoint

WIDTH, HEIGHT = 300.0, 120.0
_SERIES = 6
"""Colours that the style has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve; `colour` 0 to 5 names the style's series."""

    label: str
    colour: int
    path: str
    dots: tuple[tuple[float, float, str], ...]
    """(x, y, what stands there)."""
    dashed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """Curves on one pair of axes."""

    title: str
    note: str
    lines: tuple[Line, ...]
    x_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, str], ...] = ()
    """Vertical marks, such as the knee."""
    bands: tuple[tuple[float, str], ...] = ()
    """Horizontal marks, such as the random directions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StressView:
    """Everything that the page says."""

    headline: str
    lede: str
    answers: tuple[tuple[str, str, str, str], ...]
    """(question, short answer, detail, tone)."""
    figures: tuple[Figure, ...]
    points: tuple[tuple[str, ...], ...]
    gains: tuple[tuple[str, ...], ...]
    controls: tuple[tuple[str, ...], ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


POINT_HEADS = (
    "Attribute", "Method", ">Size", ">se", ">rho delta", ">rho judge", ">coherent", ">published", ">F1", ">slope",
    ">outputs", ">extract s", ">generate s", ">RAM MiB",
)  # fmt: skip
GAIN_HEADS = ("Method", ">From", ">To", ">Gain", ">Low", ">High", ">Seeds", "Decided")
CONTROL_HEADS = ("Attribute", ">Directions", ">Mean", ">95th percentile", ">99th", ">Highest")


def view(result: Stress) -> StressView:
    """Read a result into sentences, curves and tables."""
    best = max(result.curves, key=lambda one: max(one.se))
    knee, plan = best.knee, result.plan
    at = knee.size or plan.sizes[best.se.index(max(best.se))]
    chosen = [one for one in result.points if one.method == best.method and one.size == at]
    low = min(one.effectiveness.se for one in chosen)
    high = max((one.p95 for one in result.controls), default=None)
    answers = (
        (
            "Does it steer?",
            f"se {_two(best.se[plan.sizes.index(at)])} at {at} examples",
            f"lowest attribute {_two(low)}, {chosen[0].effectiveness.n} outputs each",
            "good" if low > (high or 0.0) else "bad",
        ),
        (
            "Does any direction?",
            "not measured" if high is None else f"95th percentile {_two(high)}",
            "highest over the attributes, random directions of equal strength",
            "neutral" if high is None else "good" if high < 0.2 else "bad",
        ),
        (
            "How much data is enough?",
            str(knee.size) if knee.size else knee.status,
            knee.sentence,
            "good" if knee.status == "found" else "neutral",
        ),
    )
    return StressView(
        headline=f"{best.method} reaches se {_two(best.se[plan.sizes.index(at)])} at {at} examples a label",
        lede=f"{result.conclusion} Model {plan.model}, {plan.dtype}. "
        f"{fmt.count(result.outputs, 'output')} in {result.seconds / 60:.1f} "
        f"minutes. Delta: {plan.delta}. Judge: {plan.judge}.",
        answers=answers,
        figures=_figures(result, best, at),
        points=tuple(_row(one) for one in result.points),
        gains=tuple(
            (
                one.method,
                str(gain.size),
                str(gain.double),
                *(fmt.signed(value, 2) for value in (gain.gain, gain.low, gain.high)),
                str(gain.seeds),
                "yes" if gain.decided else "no",
            )
            for one in result.curves
            for gain in one.knee.gains
        ),
        controls=tuple(
            (one.attribute, str(one.directions), *(_two(value) for value in (one.mean, one.p95, one.p99, one.highest)))
            for one in result.controls
        ),
        facts=(
            ("directory", result.path),
            ("strengths", ", ".join(f"{one:g}" for one in plan.strengths)),
            ("strength 1", f"{plan.scale:g} {plan.unit}, at {', '.join(plan.sites)}"),
            ("prompts and seeds", f"{len(plan.prompts)} x {plan.seeds} (at most {plan.max_seeds})"),
            ("tokens, temperature", f"{plan.max_tokens}, {plan.temperature:g}"),
            ("label noise", f"{plan.label_noise:g}"),
            ("seed", str(plan.seed)),
        ),
        notes=result.notes,
    )


def render(result: Stress) -> str:
    """Return the page."""
    return _html._page(
        "stress.html.j2",
        scripts={},
        style=_html._asset("report.css") + _html._asset("commits.css") + _html._asset("stress.css"),
        title=f"Scaling test of steering vectors: {result.plan.model}",
        created=result.created,
        sections=[("answer", "Answer"), ("curves", "Curves"), ("record", "Figures")],
        view=view(result),
        heads={"points": POINT_HEADS, "gains": GAIN_HEADS, "controls": CONTROL_HEADS},
    )


def render_text(result: Stress, *, width: int, color: bool) -> str:
    """Return the text form."""
    seen = view(result)
    page = TextPage(width, color)
    page.line(seen.headline, "bold")
    page.line(seen.lede, "dim")
    page.line("")
    for question, short, detail, tone in seen.answers:
        page.item(f"{question} {short}", detail, {"good": "green", "bad": "red"}.get(tone, ""))
    page.table("Attribute by attribute", POINT_HEADS[:9], tuple(row[:9] for row in seen.points))
    if seen.gains:
        page.table("What doubling adds", GAIN_HEADS, seen.gains)
    if seen.controls:
        page.table("Random directions", CONTROL_HEADS, seen.controls)
    page.lines((f"note: {one}" for one in seen.notes), "yellow")
    page.facts(dict(seen.facts))
    return page.text()


def _figures(result: Stress, best: MethodCurve, at: int) -> tuple[Figure, ...]:
    plan = result.plan
    mean = {
        size: [one for one in result.points if one.method == best.method and one.size == size] for size in plan.sizes
    }
    knee = ((math.log2(best.knee.size), "knee"),) if best.knee.size else ()
    training = [
        (f"{kind}, {curve.method}", list(zip(plan.sizes, values, strict=True)))
        for curve in result.curves for kind, values in (("se", curve.se), ("F1", curve.f1))
    ]  # fmt: skip
    band = max((one.p95 for one in result.controls), default=None)
    seconds = {size: sum(one.extract_seconds + one.generate_seconds for one in found) for size, found in mean.items()}
    gained = [
        (
            f"per doubling, {one.method}",
            [(b, y - x) for b, x, y in zip(plan.sizes[1:], one.se, one.se[1:], strict=False)],
        )
        for one in result.curves
    ]
    work = [
        ("per second of extraction", [
            (size, (best.se[index] - best.se[index - 1]) / max(sum(one.extract_seconds for one in mean[size]), 1e-9))
            for index, size in enumerate(plan.sizes) if index
        ]),
    ]  # fmt: skip
    delta = [(name, _by_strength(result, best.method, name, at, "delta")) for name in plan.attributes]
    coherent = [(name, _by_strength(result, best.method, name, at, "coherence")) for name in plan.attributes]
    ram = [("RAM", [(size, max(one.ram_bytes for one in found) / 2**20) for size, found in mean.items()])]
    if any(one.vram_bytes for one in result.points):
        ram.append(("VRAM", [(size, max(one.vram_bytes for one in found) / 2**20) for size, found in mean.items()]))
    return (
        _figure("Training curve", "Mean over the attributes.", training, sizes=True, marks=knee,
                bands=() if band is None else ((band, "random, 95th percentile"),)),
        _figure("Gain of a doubling", "Of mean se.", gained, sizes=True, marks=knee),
        _figure("Gain per second", "Of mean se, per second of extraction.", work, sizes=True, marks=knee),
        _figure("Cost", "Seconds of extraction and outputs, all attributes.", [("seconds", list(seconds.items()))],
                sizes=True),
        _figure("Delta against strength", f"At {at} examples a label.", delta, sizes=False),
        _figure("Coherence", f"Share of coherent outputs at {at} examples a label.", coherent, sizes=False),
        _figure("Memory", "Peak so far, MiB; it never falls.", ram, sizes=True),
    )  # fmt: skip


def _by_strength(result: Stress, method: str, attribute: str, size: int, what: str) -> list[tuple[float, float]]:
    return [
        (one.strength, getattr(one, what))
        for one in result.strengths
        if (one.method, one.attribute, one.size) == (method, attribute, size)
    ]


def _figure(
    title: str,
    note: str,
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    sizes: bool,
    marks: tuple[tuple[float, str], ...] = (),
    bands: tuple[tuple[float, str], ...] = (),
) -> Figure:
    scaled = [(label, [(math.log2(x) if sizes else x, x, y) for x, y in line]) for label, line in curves]
    xs = sorted({(place, x) for _, line in scaled for place, x, _ in line})
    ys = [y for _, line in scaled for _, _, y in line if math.isfinite(y)] + [y for y, _ in bands] + [0.0]
    left, right, low, high = xs[0][0], xs[-1][0], min(ys), max(ys)
    ticks = _nice(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def across(place: float) -> float:
        return round(WIDTH * (place - left) / ((right - left) or 1.0), 1)

    def down(value: float) -> float:
        return round(HEIGHT * (1 - (value - low) / ((high - low) or 1.0)), 1)

    lines = []
    for index, (label, line) in enumerate(scaled):
        dots = tuple((across(p), down(y), f"{label}: {fmt.number(y)} at {x:g}") for p, x, y in line if math.isfinite(y))
        path = "M" + "L".join(f"{x} {y}" for x, y, _ in dots) if dots else ""
        lines.append(Line(label=label, colour=index % _SERIES, path=path, dots=dots, dashed=index >= _SERIES))
    return Figure(
        title=title,
        note=note,
        lines=tuple(lines),
        x_label="examples a label" if sizes else "strength",
        x_ticks=tuple((across(place), f"{x:g}") for place, x in xs if sizes or abs(x) != 0.25),
        y_ticks=tuple((down(y), f"{y:g}") for y in ticks),
        marks=tuple((across(place), text) for place, text in marks),
        bands=tuple((down(y), text) for y, text in bands),
    )


def _nice(low: float, high: float) -> list[float]:
    """Three to six round numbers that hold everything."""
    span = (high - low) or 1.0
    raw = span / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= raw)
    return [round(step * k, 10) for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _row(one: StressPoint) -> tuple[str, ...]:
    found = one.effectiveness
    return (
        one.attribute, one.method, str(one.size), _two(found.se), _two(found.rho_delta), _two(found.rho_judge),
        fmt.percent(found.coherence), _two(found.published), _two(one.f1), _two(found.slope), str(found.n),
        f"{one.extract_seconds:.1f}", f"{one.generate_seconds:.1f}", f"{one.ram_bytes / 2**20:.0f}",
    )  # fmt: skip


def _two(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else fmt.number(value)
