"""What the page and the text of an evaluation say, as plain dataclasses, and how they are rendered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from trimtab.report import _format as fmt
from trimtab.report import _html
from trimtab.report._console import MAX_LINES, TextPage
from trimtab.results.evaluation import DoseResponse, Evaluation, ParetoPoint, SideEffects, SplitHalf

WIDTH, HEIGHT = 300.0, 150.0
SERIES = 6
_TONE = {"good": "green", "bad": "red", "neutral": ""}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationView:
    """Everything that is said about an `Evaluation`."""

    headline: str
    lede: str
    answers: tuple[tuple[str, str, str, str], ...]
    """(question, short answer, detail, tone)."""
    doses: tuple[Panel, ...]
    tradeoffs: tuple[Panel, ...]
    scores: tuple[tuple[str, str, str, str, str, str, str, str], ...]
    """(variant, scorer, mean, interval, spread, outputs, refusals, missing)."""
    effects: tuple[tuple[str, ...], ...]
    splits: tuple[tuple[str, ...], ...]
    classifiers: tuple[tuple[str, ...], ...]


EFFECT_HEADS = ("perplexity", "ratio", "coherent", "loops", "repetition", "distinct-2", "refusals", "KL", "retention")
SPLIT_HEADS = ("strength", "chosen by", "gain where chosen", "gain held out", "over splits")
CLASSIFIER_HEADS = ("AUC", "interval", "accuracy", "F1", "texts", "questions")


def view(result: Evaluation) -> EvaluationView:
    """Read an evaluation into sentences, rows and panels."""
    best = _best(result)
    return EvaluationView(
        headline=_headline(best),
        lede=f"{fmt.count(result.count, 'output')} of {result.model}, scored by {', '.join(result.scorers)}.",
        answers=_answers(result, best),
        doses=tuple(_dose_panels(result)),
        tradeoffs=tuple(_tradeoffs(result)),
        scores=tuple(
            (one.variant, one.scorer, fmt.number(one.mean), _interval(one.low, one.high), fmt.number(one.std),
             f"{one.count:,}", f"{one.refusals:,}", f"{one.missing:,}")
            for one in result.summaries
        ),
        effects=tuple(_effect(one) for one in result.effects),
        splits=tuple(
            (one.group, one.scorer, fmt.number(one.chosen), fmt.percent(one.stability), fmt.number(one.selected),
             fmt.number(one.held_out), _interval(one.low, one.high))
            for one in result.split_half
        ),
        classifiers=tuple(
            (one.name, fmt.number(one.auc), _interval(one.auc_low, one.auc_high), fmt.percent(one.accuracy),
             fmt.number(one.f1), f"{one.held_out:,}", f"{one.questions:,}")
            for one in result.classifiers
        ),
    )  # fmt: skip


def render(result: Evaluation) -> str:
    """Return the page of an evaluation."""
    made = view(result)
    sections = [("answer", "Answer")]
    sections += [("dose", "Dose")] if made.doses else []
    sections += [("cost", "Effect and damage")] if made.tradeoffs else []
    sections += [("scores", "Scores")]
    return _html._page(
        "evaluation.html.j2",
        scripts={},
        style=_html._asset("report.css") + _html._asset("evaluation.css"),
        title=f"Evaluation {result.path}",
        created="",
        sections=sections,
        result=result,
        view=made,
        heads={"effects": EFFECT_HEADS, "splits": SPLIT_HEADS, "classifiers": CLASSIFIER_HEADS},
    )


def render_text(result: Evaluation, *, width: int, color: bool) -> str:
    """Return the text form of an evaluation."""
    made = view(result)
    page = TextPage(width, color)
    page.line(made.headline, "bold")
    page.line(made.lede, "dim")
    page.line("")
    for question, short, detail, tone in made.answers:
        page.item(f"{question} {short}", detail, _TONE[tone])
    page.table(
        "Scores",
        ("variant", "scorer", ">mean", ">95 % interval", ">std", ">outputs", ">refusals", ">missing"),
        made.scores[:MAX_LINES],
        left_out=len(made.scores) - MAX_LINES,
    )
    if made.effects:
        page.table("Side effects", ("variant", *(f">{one}" for one in EFFECT_HEADS)), made.effects[:MAX_LINES])
    if made.splits:
        page.table("Strength chosen on one half, scored on the other",
                   ("vector", "scorer", *(f">{one}" for one in SPLIT_HEADS)), made.splits[:MAX_LINES])  # fmt: skip
    if made.classifiers:
        page.table("Classifiers, on held-out questions", ("name", *(f">{one}" for one in CLASSIFIER_HEADS)),
                   made.classifiers)  # fmt: skip
    for one in result.summaries:
        page.lines((f"  {one.variant}, {one.scorer}: missing because {reason}" for reason in one.reasons), "yellow")
    page.line("")
    page.lines((f"note: {one}" for one in result.warnings), "yellow")
    page.facts({"kept in": result.path})
    return page.text()


def _is_control(group: str) -> bool:
    return group.startswith("random-")


def _best(result: Evaluation) -> DoseResponse | None:
    """The vector whose score moves most surely with its strength, under the first scorer."""
    own = [
        one
        for one in result.dose_responses
        if one.scorer == result.scorers[0] and not _is_control(one.group) and not one.group.endswith("@norm")
    ]
    return max(own, key=lambda one: (abs(one.spearman), abs(one.slope)), default=None)


def _headline(best: DoseResponse | None) -> str:
    if best is None:
        return "No vector ran at any strength: scores are listed, a dose-response is not"
    if best.slope_low > 0:
        return f"{best.group} steers: {best.scorer} rises with its strength"
    if best.slope_high < 0:
        return f"{best.group} steers the other way: {best.scorer} falls with its strength"
    return f"{best.group} does not measurably move {best.scorer}"


def _answers(result: Evaluation, best: DoseResponse | None) -> tuple[tuple[str, str, str, str], ...]:
    if best is None:
        return ()
    holds = best.slope_low > 0
    spread = _interval(best.slope_low, best.slope_high)
    found = [
        (
            "Does it steer?",
            "Yes" if holds else "Backwards" if best.slope_high < 0 else "Not measurably",
            f"slope {fmt.number(best.slope)} per unit, 95 % interval {spread}; rank correlation "
            f"{fmt.number(best.spearman)} over {best.n:,} outputs" + (f" ({best.reason})" if best.reason else ""),
            "good" if holds else "bad",
        )
    ]
    controls = [one for one in result.dose_responses if _is_control(one.group) and one.scorer == best.scorer]
    if controls:
        most = max(controls, key=lambda one: abs(one.slope))
        beaten = abs(best.slope) > abs(most.slope)
        found.append(
            (
                "More than chance?",
                "Yes" if beaten else "No",
                f"the steepest of {fmt.count(len(controls), 'random direction')} has slope {fmt.number(most.slope)}",
                "good" if beaten else "bad",
            )
        )
    split = next((one for one in result.split_half if (one.group, one.scorer) == (best.group, best.scorer)), None)
    if split is not None:
        found.append(_choice(split))
        found += _cost(result, split)
    return tuple(found)


def _choice(split: SplitHalf) -> tuple[str, str, str, str]:
    if math.isnan(split.chosen):
        return ("Which strength?", "None", "no strength keeps within the perplexity budget", "bad")
    return (
        "Which strength?",
        f"{split.chosen:+g}",
        f"chosen by {fmt.percent(split.stability)} of the half splits; gain {fmt.number(split.held_out)} on the other "
        f"halves, {fmt.number(split.selected)} where it was chosen",
        "good" if split.held_out > 0 else "bad",
    )


def _cost(result: Evaluation, split: SplitHalf) -> list[tuple[str, str, str, str]]:
    name = f"{split.group}@{split.chosen:+g}"
    one = next((one for one in result.effects if one.variant == name), None)
    if one is None:
        return []
    dear = one.perplexity_ratio > 1.5 or one.loops > 0.1
    detail = f"perplexity against unsteered; {fmt.percent(one.coherent)} of the outputs are coherent"
    return [("At what cost?", f"x {fmt.number(one.perplexity_ratio)}", detail, "bad" if dear else "good")]


def _effect(one: SideEffects) -> tuple[str, ...]:
    return (
        one.variant,
        fmt.number(one.perplexity),
        fmt.number(one.perplexity_ratio),
        fmt.percent(one.coherent) if math.isfinite(one.coherent) else "-",
        fmt.percent(one.loops),
        fmt.number(one.repetition_4),
        fmt.number(one.distinct_2),
        fmt.percent(one.refusal_rate),
        fmt.number(one.kl) if math.isfinite(one.kl) else "-",
        fmt.number(one.retention) if math.isfinite(one.retention) else "-",
    )


def _interval(low: float, high: float) -> str:
    return f"{fmt.number(low)} to {fmt.number(high)}" if math.isfinite(low) and math.isfinite(high) else "-"


def _dose_panels(result: Evaluation) -> list[Panel]:
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
        own = [one.group for one in doses if not _is_control(one.group)]
        curves = tuple(
            _curve(one, own.index(one.group) % SERIES if one.group in own else -1, across, down) for one in doses
        )
        panels.append(
            Panel(
                title=doses[0].scorer,
                note="at matched norms" if norms else {"token_norm": "parts of each token's norm"}.get(unit, unit),
                curves=tuple(sorted(curves, key=lambda one: one.series)),
                zero=down(0.0) if min(ys) < 0 < max(ys) else None,
                x_ticks=tuple((across(x), f"{x:+g}" if x else "0") for x in _thin(sorted(set(xs)), across)),
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
            (x, y, f"{dose.group} at {point.scale:+g}: {fmt.number(point.mean)}, {_interval(point.low, point.high)}")
            for (x, y), point in zip(places, dose.points, strict=True)
        ),
    )


def _tradeoffs(result: Evaluation) -> list[Panel]:
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
