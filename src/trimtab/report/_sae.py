"""What the page and the text of an evaluation of autoencoders say: one view of sentences, curves, bars and tables."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.report import _html
from trimtab.report._console import MAX_LINES, TextPage
from trimtab.report._precision import PrecisionView, precision_view
from trimtab.report._sae_figures import Histogram, Panel, cosines, density, interval, panels
from trimtab.results.sae_evaluation import Example, LatentExamples, SAEEvaluation, SAEScore

MAX_DRAWN = 12
"""Autoencoders whose histograms are drawn."""
_SCORE_COLUMNS, _SPLICE_COLUMNS = (0, 2, 3, 5, 6, 7, 8, 9, 10), 7
"""What the text form has room for."""
_TONE = {"good": "green", "bad": "red", "neutral": ""}
SCORE_HEADS = (
    "autoencoder", "family", ">latents", ">L0", ">95 % interval", ">FVU", ">95 % interval", ">CE recovered",
    ">delta CE", ">KL", ">dead", ">cosine", ">l2 ratio", ">bias", ">decoder cosine",
)  # fmt: skip
SPLICE_HEADS = (
    "autoencoder", ">clean", ">spliced", ">mean", ">zero", ">delta CE", ">95 % interval", ">recovered, zero",
    ">95 % interval", ">recovered, mean", ">KL", ">95 % interval",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One token of an example."""

    text: str
    share: int
    """Of the latent's largest activation, percent."""
    is_at: bool
    title: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentView:
    """One latent with its strongest firings."""

    name: str
    facts: str
    examples: tuple[tuple[str, tuple[Token, ...]], ...]
    """(activation, tokens)."""
    separator: str
    """Between tokens: nothing where they bring their own spaces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEView:
    """Everything that is said about an `SAEEvaluation`."""

    kicker: str
    headline: str
    lede: str
    answers: tuple[tuple[str, str, str, str], ...]
    """(question, short answer, detail, tone)."""
    panels: tuple[Panel, ...]
    matched_heads: tuple[str, ...]
    matched: tuple[tuple[str, ...], ...]
    histograms: tuple[tuple[str, tuple[Histogram, ...]], ...]
    """(autoencoder, its histograms)."""
    histograms_left_out: int
    latents: tuple[tuple[str, tuple[LatentView, ...]], ...]
    scores: tuple[tuple[str, ...], ...]
    splices: tuple[tuple[str, ...], ...]
    precision: tuple[PrecisionView, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def view(result: SAEEvaluation) -> SAEView:
    """Read an evaluation into sentences, curves, bars and tables."""
    heads, rows = _matched(result)
    drawn = result.scores[:MAX_DRAWN]
    return SAEView(
        kicker=f"{fmt.count(len(result.scores), 'sparse autoencoder')} at {_where(result)}",
        headline=_headline(result),
        lede=_lede(result),
        answers=_answers(result),
        panels=panels(result.scores),
        matched_heads=heads,
        matched=rows,
        histograms=tuple((one.name, (density(one), cosines(one))) for one in drawn),
        histograms_left_out=len(result.scores) - len(drawn),
        latents=tuple((one.name, tuple(map(_latent, one.latents))) for one in result.scores if one.latents),
        scores=tuple(map(_score, result.scores)),
        splices=tuple(_splice(one) for one in result.scores if one.splice is not None),
        precision=tuple(map(precision_view, result.precision)),
        facts=(
            ("data", result.data),
            ("digest of the set", result.data_digest),
            ("model", f"{result.model} ({result.model_dtype})" if result.model else ""),
            ("digest of the model", result.model_digest),
            ("left out", "; ".join(f"{count:,}: {reason}" for reason, count in result.left_out.items())),
            ("seed", str(result.seed)),
            ("kept in", result.path),
        ),
        notes=(*result.warnings, *(f"{one.name}: {text}" for one in result.scores for text in one.warnings)),
    )


def render(result: SAEEvaluation) -> str:
    """Return the page."""
    made = view(result)
    sections = [("answer", "Answer")]
    sections += [("curves", "Curves")] if made.panels or made.matched else []
    sections += [("densities", "Densities")]
    sections += [("latents", "Latents")] if made.latents else []
    sections += [("precision", "Precision")] if made.precision else []
    return _html._page(
        "sae.html.j2",
        scripts={},
        style=_html._asset("report.css") + _html._asset("evaluation.css") + _html._asset("sae.css"),
        title=made.headline,
        created="",
        sections=[*sections, ("record", "Figures")],
        view=made,
        heads={"scores": SCORE_HEADS, "splices": SPLICE_HEADS},
    )


def render_text(result: SAEEvaluation, *, width: int, color: bool) -> str:
    """Return the text form."""
    made = view(result)
    page = TextPage(width, color)
    page.line(made.headline, "bold")
    page.line(made.lede, "dim")
    page.line("")
    for question, short, detail, tone in made.answers:
        page.item(f"{question} {short}", detail, _TONE[tone])
    narrow = [tuple(row[place] for place in _SCORE_COLUMNS) for row in made.scores[:MAX_LINES]]
    heads = tuple(SCORE_HEADS[place] for place in _SCORE_COLUMNS)
    page.table("Autoencoders", heads, narrow, left_out=len(made.scores) - MAX_LINES)
    if made.matched:
        page.table("At equal L0", made.matched_heads, made.matched[:MAX_LINES])
    if made.splices:
        rows = [row[:_SPLICE_COLUMNS] for row in made.splices[:MAX_LINES]]
        page.table("Cross entropy, nats per token", SPLICE_HEADS[:_SPLICE_COLUMNS], rows)
    for name, listed in made.latents[:1]:
        shown = [(one.name, one.facts, _line(one)) for one in listed]
        page.table(f"Latents of {name}, and where each fires most", ("latent", "figures", "text"), shown[:MAX_LINES])
    page.line("")
    page.lines((f"note: {one}" for one in made.notes), "yellow")
    page.facts(dict(made.facts))
    return page.text()


def _where(result: SAEEvaluation) -> str:
    crosses = result.target_site != result.site
    return f"{result.site} to {result.target_site}" if crosses else result.site


def _headline(result: SAEEvaluation) -> str:
    best = min(result.scores, key=lambda one: one.fvu.value)
    if len(result.scores) == 1:
        return f"{best.name} explains {_explained(best)} with {fmt.number(best.l0.value)} latents a token"
    if result.matched:
        last = result.matched[-1].l0
        there = sorted((one for one in result.matched if one.l0 == last), key=lambda one: one.fvu)
        rest = ", ".join(f"{one.family} {fmt.number(one.fvu)}" for one in there[1:])
        return f"At L0 {fmt.number(last)} {there[0].family} leaves {fmt.number(there[0].fvu)} unexplained; {rest}"
    return f"{best.name} explains most: {_explained(best)} with {fmt.number(best.l0.value)} latents a token"


def _explained(one: SAEScore) -> str:
    return f"{fmt.percent(max(0.0, 1 - one.fvu.value))} of the variance"


def _lede(result: SAEEvaluation) -> str:
    through = f" through {result.model}" if result.model else ""
    return (
        f"{result.tokens:,} tokens of {fmt.count(result.texts, 'text')}{through}. The fraction of variance unexplained "
        "(FVU) has the mean of this whole set in its denominator; intervals are 95 %, from resampling texts."
    )


def _answers(result: SAEEvaluation) -> tuple[tuple[str, str, str, str], ...]:
    one = min(result.scores, key=lambda score: score.fvu.value)
    several = len(result.scores) > 1
    whose = f"{one.name}: " if several else ""
    found = [
        (
            "What is left unexplained?",
            f"FVU {fmt.number(one.fvu.value)}",
            f"{whose}{interval(one.fvu)}, at L0 {fmt.number(one.l0.value)}",
            "bad" if one.fvu.value >= 1 else "neutral",
        )
    ]
    splice = one.splice
    if splice is not None:
        found.append(
            (
                "What does the model lose?",
                f"{fmt.signed(splice.delta_ce.value)} nats",
                f"{whose}cross entropy {fmt.number(splice.ce_clean)} to {fmt.number(splice.ce_sae)}; "
                f"{fmt.percent(splice.recovered.value)} recovered against zeros; KL {fmt.number(splice.kl.value)}",
                "neutral",
            )
        )
    parts = one.densities
    idle = f"all {one.d_sae:,} fire on these tokens"
    if parts.dead:
        limit = fmt.number(parts.dead_below, 2)
        idle = f"{parts.dead:,} of {one.d_sae:,} never fire, so their densities are under {limit}"
    found.append(
        (
            "Are its latents alive?",
            f"{fmt.percent(parts.dead_share)} dead",
            f"{whose}{idle}; {fmt.count(parts.always, 'latent')} on more than half of them",
            "bad" if parts.dead_share > 0.5 else "good" if parts.dead_share < 0.1 else "neutral",
        )
    )
    found.append(
        (
            "Does it shrink?",
            f"bias {fmt.number(one.bias, 4)}",
            f"{whose}1 has none; reconstructions are {fmt.number(one.l2_ratio, 4)} as long as the activations",
            "neutral",
        )
    )
    return tuple(found)


def _matched(result: SAEEvaluation) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    families = list(dict.fromkeys(one.family for one in result.matched))
    heads = (">L0", *(f">{figure}: {family}" for figure in ("FVU", "KL") for family in families))
    found = {(one.family, one.l0): one for one in result.matched}
    rows = []
    for place in dict.fromkeys(one.l0 for one in result.matched):
        there = [found[family, place] for family in families]
        fvu, kl = (fmt.number(one.fvu) for one in there), (fmt.number(one.kl) for one in there)
        rows.append((fmt.number(place), *fvu, *kl))
    return (heads, tuple(rows)) if rows else ((), ())


def _latent(one: LatentExamples) -> LatentView:
    return LatentView(
        name=str(one.latent),
        facts=f"{fmt.percent(one.density)} of tokens; max {fmt.number(one.max)}, mean {fmt.number(one.mean)}",
        examples=tuple((fmt.number(example.activation), _tokens(example, one.max)) for example in one.examples),
        separator="" if any(text[:1].isspace() for shown in one.examples for text in shown.tokens) else " ",
    )


def _tokens(example: Example, largest: float) -> tuple[Token, ...]:
    return tuple(
        Token(
            text=text,
            share=round(100 * min(1.0, value / largest)) if largest > 0 else 0,
            is_at=place == example.at,
            title=f"{fmt.number(value)}"
            + (f", text {example.text}, position {example.position}" * (place == example.at)),
        )
        for place, (text, value) in enumerate(zip(example.tokens, example.activations, strict=True))
        if text
    )


def _line(one: LatentView) -> str:
    """The strongest firing with a few tokens around it."""
    if not one.examples or not one.examples[0][1]:
        return fmt.MISSING
    tokens = one.examples[0][1]
    at = next((place for place, token in enumerate(tokens) if token.is_at), 0)
    near = tokens[max(0, at - 5) : at + 5]
    return fmt.one_line(one.separator.join(f"[{token.text}]" if token.is_at else token.text for token in near), 72)


def _score(one: SAEScore) -> tuple[str, ...]:
    splice = one.splice
    return (
        one.name,
        one.family,
        f"{one.d_sae:,}",
        fmt.number(one.l0.value),
        interval(one.l0),
        fmt.number(one.fvu.value),
        interval(one.fvu),
        fmt.MISSING if splice is None else fmt.percent(splice.recovered.value),
        fmt.MISSING if splice is None else fmt.number(splice.delta_ce.value),
        fmt.MISSING if splice is None else fmt.number(splice.kl.value),
        fmt.percent(one.densities.dead_share),
        fmt.number(one.cosine, 4),
        fmt.number(one.l2_ratio, 4),
        fmt.number(one.bias, 4),
        fmt.number(one.decoder.median),
    )


def _splice(one: SAEScore) -> tuple[str, ...]:
    splice = one.splice
    assert splice is not None
    return (
        one.name,
        *(fmt.number(value, 4) for value in (splice.ce_clean, splice.ce_sae, splice.ce_mean, splice.ce_zero)),
        fmt.number(splice.delta_ce.value),
        interval(splice.delta_ce),
        fmt.percent(splice.recovered.value),
        interval(splice.recovered, 4),
        fmt.percent(splice.recovered_mean.value),
        fmt.number(splice.kl.value),
        interval(splice.kl),
    )
