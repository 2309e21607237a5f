"""The page of a comparison of steering vectors: what it says, as plain dataclasses, and its HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.report import _html
from trimtab.results.vectors_clean import VectorComparison, VectorFacts, VectorPair

MAX_CELLS = 60
"""Vectors on a side of the matrix."""
MAX_PAIRS = 500
_RANDOM_Z = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cosine of the matrix."""

    text: str
    title: str
    color: str
    """How much of the colour of its sign it has, from 0 to 100; empty where there is no pair."""
    positive: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorsView:
    """Everything that the page says."""

    headline: str
    lede: str
    answers: tuple[tuple[str, str, str, str], ...]
    """(question, short answer, detail, tone)."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    left_out: int
    """Vectors that the matrix does not show."""
    vectors: tuple[tuple[str, ...], ...]
    has_losses: bool
    pairs: tuple[tuple[str, ...], ...]
    pairs_title: str
    pairs_left_out: int


def view(result: VectorComparison) -> VectorsView:
    """Read a comparison into sentences, a matrix and tables."""
    names = [one.name for one in result.vectors]
    across = list(result.against)
    down = [name for name in names if name not in set(across)] if across else names
    across = across or names
    listed = list(result.matched or sorted(result.pairs, key=lambda pair: -abs(pair.cosine)))
    found = {(pair.a, pair.b): pair for pair in result.pairs}
    has_losses = any(_losses(one) for one in result.vectors)
    return VectorsView(
        headline=_headline(result),
        lede=_lede(result),
        answers=_answers(result),
        columns=tuple(across[:MAX_CELLS]),
        rows=tuple((a, tuple(_cell(a, b, found) for b in across[:MAX_CELLS])) for a in down[:MAX_CELLS]),
        left_out=max(0, len(down) - MAX_CELLS) + max(0, len(across) - MAX_CELLS) * (across != names),
        vectors=tuple(_vector(one, has_losses) for one in result.vectors),
        has_losses=has_losses,
        pairs=tuple(_pair(pair) for pair in listed[:MAX_PAIRS]),
        pairs_title="Vectors of one name" if result.matched else "Pairs, the most alike first",
        pairs_left_out=max(0, len(listed) - MAX_PAIRS),
    )


def render(result: VectorComparison) -> str:
    """Return the page."""
    made = view(result)
    return _html._page(
        "vectors.html.j2",
        scripts={},
        style=_html._asset("report.css") + _html._asset("vectors.css"),
        title=made.headline,
        created="",
        sections=[("answer", "Answer"), ("matrix", "Cosines"), ("pairs", "Pairs"), ("vectors", "Vectors")],
        result=result,
        view=made,
    )


def _headline(result: VectorComparison) -> str:
    if result.matched:
        mean = sum(pair.cosine for pair in result.matched) / len(result.matched)
        return f"Matched vectors have a mean cosine of {fmt.number(mean)}"
    top = max(result.pairs, key=lambda pair: abs(pair.cosine))
    return f"{top.a} and {top.b} are the most alike: cosine {fmt.number(top.cosine)}"


def _lede(result: VectorComparison) -> str:
    widths = sorted({one.width for one in result.vectors})
    level = ", ".join(fmt.number(width**-0.5, 2) for width in widths)
    listed = ", ".join(map(str, widths))
    return (
        f"{fmt.count(len(result.pairs), 'pair')} of {fmt.count(len(result.vectors), 'vector')} of width {listed}. "
        f"Random directions have a cosine of 0 with a standard deviation of {level}; z counts these deviations."
    )


def _answers(result: VectorComparison) -> tuple[tuple[str, str, str, str], ...]:
    pairs = result.matched or result.pairs
    apart = sum(abs(pair.z) > _RANDOM_Z for pair in pairs)
    norms = [one.norm for one in result.vectors]
    lossy = [one for one in result.vectors if one.validation_loss is not None and one.baseline_loss is not None]
    better = sum(_gain(one) > 0 for one in lossy)
    losses = (
        ("Do they lower the loss?", f"{better} of {len(lossy)}", "validation loss under that of the unsteered model",
         "good" if better == len(lossy) else "bad")
        if lossy
        else ("Do they lower the loss?", "not known", "no file holds a validation loss and the unsteered one", "")
    )  # fmt: skip
    which = "matched pairs" if result.matched else "pairs"
    return (
        ("Are they alike?", f"{apart} of {len(pairs)}", f"{which} with |z| above {_RANDOM_Z:g}: more than chance", ""),
        ("How long are they?", f"{fmt.number(min(norms))} to {fmt.number(max(norms))}", "norms, in hidden units", ""),
        losses,
    )


def _cell(a: str, b: str, found: dict[tuple[str, str], VectorPair]) -> Cell:
    pair = found.get((a, b)) or found.get((b, a))
    if pair is None:
        return Cell(text="", title=a if a == b else f"{a}, {b}: not compared", color="", positive=True)
    return Cell(
        text=f"{pair.cosine:.2f}".replace("-0.00", "0.00"),
        title=f"{a}, {b}: cosine {fmt.number(pair.cosine, 4)}, z {fmt.number(pair.z)}",
        color=f"{55 * abs(pair.cosine):.0f}",
        positive=pair.cosine >= 0,
    )


def _pair(pair: VectorPair) -> tuple[str, ...]:
    site = "same" if pair.same_site else "different or unknown"
    return (pair.a, pair.b, fmt.number(pair.cosine, 4), fmt.signed(pair.z), fmt.number(pair.norm_ratio, 4), site)


def _vector(one: VectorFacts, has_losses: bool) -> tuple[str, ...]:
    facts = (one.name, one.method, one.site, fmt.number(one.norm, 4), fmt.number(one.median_norm, 4))
    losses = tuple(fmt.number(value, 4) for value in (one.validation_loss, one.baseline_loss, one.prompted_loss))
    return (*facts, *(losses if has_losses else ()), one.path or "in memory")


def _losses(one: VectorFacts) -> Sequence[float]:
    return [value for value in (one.validation_loss, one.baseline_loss, one.prompted_loss) if value is not None]


def _gain(one: VectorFacts) -> float:
    return (one.baseline_loss or 0.0) - (one.validation_loss or 0.0)
