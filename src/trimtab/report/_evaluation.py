"""What the page and the text of an evaluation say, as plain dataclasses, and how they are rendered."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.report import _html
from trimtab.report._console import MAX_LINES, TextPage
from trimtab.report._evaluation_figures import Panel, dose_panels, interval, is_control, tradeoffs
from trimtab.results.evaluation import DoseResponse, Evaluation, SideEffects, SplitHalf

NORM = "@norm"
"""Ends the name of a group that ran at a learned norm."""
_TONE = {"good": "green", "bad": "red", "neutral": ""}


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
    examples: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    """(question, (variant, text) of every vector's variants and of one random direction)."""


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
        doses=tuple(dose_panels(result)),
        tradeoffs=tuple(tradeoffs(result)),
        scores=tuple(
            (one.variant, one.scorer, fmt.number(one.mean), interval(one.low, one.high), fmt.number(one.std),
             f"{one.count:,}", f"{one.refusals:,}", f"{one.missing:,}")
            for one in result.summaries
        ),
        effects=tuple(_effect(one) for one in result.effects),
        splits=tuple(
            (one.group, one.scorer, fmt.number(one.chosen), fmt.percent(one.stability), fmt.number(one.selected),
             fmt.number(one.held_out), interval(one.low, one.high))
            for one in result.split_half
        ),
        classifiers=tuple(
            (one.name, fmt.number(one.auc), interval(one.auc_low, one.auc_high), fmt.percent(one.accuracy),
             fmt.number(one.f1), f"{one.held_out:,}", f"{one.questions:,}")
            for one in result.classifiers
        ),
        examples=_examples(result),
    )  # fmt: skip


def render(result: Evaluation) -> str:
    """Return the page of an evaluation."""
    made = view(result)
    sections = [("answer", "Answer")]
    sections += [("dose", "Dose")] if made.doses else []
    sections += [("cost", "Effect and damage")] if made.tradeoffs else []
    sections += [("outputs", "Outputs")] if made.examples else []
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
    for asked, texts in made.examples[:1]:
        page.table(f"First outputs to {asked!r}", ("variant", "text"), texts[:MAX_LINES])
    for one in result.summaries:
        page.lines((f"  {one.variant}, {one.scorer}: missing because {reason}" for reason in one.reasons), "yellow")
    page.line("")
    page.lines((f"note: {one}" for one in result.warnings), "yellow")
    page.facts({"kept in": result.path})
    return page.text()


def _best(result: Evaluation) -> DoseResponse | None:
    """The vector whose score moves most surely with its strength, under the first scorer.

    Vectors at scales come before vectors that ran only as they were learned.
    """
    own = [one for one in result.dose_responses if one.scorer == result.scorers[0] and not is_control(one.group)]
    scaled = [one for one in own if not _as_learned(one)]
    return max(scaled or own, key=lambda one: (abs(one.spearman), abs(one.slope)), default=None)


def _as_learned(dose: DoseResponse) -> bool:
    return dose.group.endswith(NORM)


def _headline(best: DoseResponse | None) -> str:
    if best is None:
        return "No vector ran at any strength: scores are listed, a dose-response is not"
    name = best.group.removesuffix(NORM)
    if best.slope_low > 0:
        return f"{name} steers: {best.scorer} rises with its strength"
    if best.slope_high < 0:
        return f"{name} steers the other way: {best.scorer} falls with its strength"
    return f"{name} does not measurably move {best.scorer}"


def _answers(result: Evaluation, best: DoseResponse | None) -> tuple[tuple[str, str, str, str], ...]:
    if best is None:
        return ()
    holds = best.slope_low > 0
    spread = interval(best.slope_low, best.slope_high)
    found = [
        (
            "Does it steer?",
            "Yes" if holds else "Backwards" if best.slope_high < 0 else "Not measurably",
            f"slope {fmt.number(best.slope)} per unit, 95 % interval {spread}; rank correlation "
            f"{fmt.number(best.spearman)} over {best.n:,} outputs" + (f" ({best.reason})" if best.reason else ""),
            "good" if holds else "bad",
        )
    ]
    controls = [
        one
        for one in result.dose_responses
        if is_control(one.group) and one.scorer == best.scorer and _as_learned(one) == _as_learned(best)
    ]
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
        f"{split.chosen:+.3g}",
        f"chosen by {fmt.percent(split.stability)} of the half splits; gain {fmt.number(split.held_out)} on the other "
        f"halves, {fmt.number(split.selected)} where it was chosen",
        "good" if split.held_out > 0 else "bad",
    )


def _cost(result: Evaluation, split: SplitHalf) -> list[tuple[str, str, str, str]]:
    vector = split.group.removesuffix(NORM)
    strength = f"{split.chosen:+g}" if vector == split.group else "learned" if split.chosen > 0 else "-learned"
    name = f"{vector}@{strength}"
    one = next((one for one in result.effects if one.variant == name), None)
    if one is None or math.isnan(split.chosen):
        return []
    dear = one.perplexity_ratio > 1.5 or one.loops > 0.1
    detail = f"perplexity against unsteered; {fmt.percent(one.coherent)} of the outputs are coherent"
    return [("At what cost?", f"x {fmt.number(one.perplexity_ratio)}", detail, "bad" if dear else "good")]


def _examples(result: Evaluation) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Outputs by question, controls after the first left out."""
    found: dict[str, list[tuple[str, str]]] = {}
    for one in result.examples:
        if not is_control(one.variant) or one.variant.startswith("random-0@"):
            found.setdefault(one.question, []).append((one.variant, one.text))
    return tuple((asked, tuple(texts)) for asked, texts in found.items())


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
