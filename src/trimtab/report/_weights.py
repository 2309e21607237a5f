"""The page and the text of an analysis of weights: what they say, as plain dataclasses, and how they are rendered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.report import _html
from trimtab.report._console import MAX_LINES, TextPage
from trimtab.report._weights_payload import payload
from trimtab.results.weights import FocusLayer, Interaction, RankedChange, WeightsAnalysis

MAX_ROWS = 400
STANDS_OUT = 5.0
_TITLES = {
    "susceptibility": "Weight matrices read through directions",
    "mlp": "MLPs read through directions",
    "attention": "Attention read through directions",
}
_HOW = {
    "relative_change": "of the answer",
    "absolute": "of the answer",
    "angular": "of the answer's direction",
    "affinity": "of who attends to whom",
    "change": "of what is written",
    "promotion": "of what is written along the direction",
}

Row = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of the page; a heading that begins with ">" belongs to a column of numbers."""

    anchor: str
    title: str
    finding: str
    heads: Row
    rows: tuple[Row, ...]
    left_out: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsView:
    """Everything that is said about a `WeightsAnalysis`."""

    kicker: str
    headline: str
    lede: str
    answers: tuple[tuple[str, str, str, str], ...]
    """(question, short answer, detail, tone)."""
    tables: tuple[Table, ...]
    facts: tuple[tuple[str, str], ...]


def view(result: WeightsAnalysis) -> WeightsView:
    """Read an analysis into sentences and tables."""
    own = len(result.directions)
    kinds = [one.kind for one in result.directions]
    named = ", ".join(fmt.count(kinds.count(kind), kind) for kind in dict.fromkeys(kinds))
    controls = " and ".join(f"{one.count} {one.kind} controls" for one in result.controls)
    return WeightsView(
        kicker=_TITLES[result.analysis],
        headline=_headline(result),
        lede=(
            f"{fmt.count(own, 'direction')} ({named}) and {controls}, at {fmt.count(len(result.layers), 'layer')} of "
            f"{result.base} and {result.tuned}. z counts deviations of the controls from their mean."
        ),
        answers=_answers(result),
        tables=tuple(table for table in _tables(result) if table.rows),
        facts=(
            ("base", result.base),
            ("tuned", result.tuned),
            ("family", f"{result.family}, {result.num_layers} layers, width {result.hidden_size}"),
            ("arithmetic", result.dtype),
            ("seed", str(result.seed)),
            ("query after key by", f"{result.offset}" if result.analysis == "attention" else ""),
            ("measurements", f"{result.num_measurements:,}"),
            ("kept in", result.path),
            ("made", result.created),
        ),
    )


def render(result: WeightsAnalysis) -> str:
    """Return the page."""
    made = view(result)
    numbers = payload(result)
    sections = [("answer", "Answer"), ("explore", "Explore")]
    sections += [(table.anchor, table.title) for table in made.tables]
    return _html._page(
        "weights.html.j2",
        scripts={"plotly_js": "plotly-cartesian.min.js", "weights_js": "weights.js"},
        style=_html._asset("report.css") + _html._asset("weights.css"),
        title=fmt.visible(f"{made.kicker}: {result.base} and {result.tuned}"),
        created=result.created,
        sections=[*sections, ("record", "Record")],
        result=result,
        view=made,
        has_heads=bool(numbers["heads"]),
        two_groups={"role", "trait"} <= set(numbers["kinds"]),
        left_out=numbers["left_out"],
        payload=_html.embed(numbers),
    )


def render_text(result: WeightsAnalysis, *, width: int, color: bool) -> str:
    """Return the text form."""
    made = view(result)
    page = TextPage(width, color)
    page.line(made.headline, "bold")
    page.line(made.lede, "dim")
    page.line("")
    for question, short, detail, tone in made.answers:
        page.item(f"{question} {short}", detail, {"good": "green", "bad": "red"}.get(tone, ""))
    for table in made.tables:
        page.table(
            table.title, table.heads, table.rows[:MAX_LINES],
            left_out=table.left_out + max(0, len(table.rows) - MAX_LINES),
        )  # fmt: skip
    page.line("")
    page.lines((f"note: {one}" for one in result.notes), "yellow")
    page.facts(dict(made.facts))
    return page.text()


def _headline(result: WeightsAnalysis) -> str:
    if result.identical:
        return "Nothing changed: every measured change is exactly zero"
    best = _first(result)
    if best is None:
        return "No layer could be measured"
    name = _name(best)
    if abs(best.z) < STANDS_OUT:
        return f"No direction stands out from the controls; {name} comes closest, in {_place(best)}"
    return f"{_place(best)[0].upper()}{_place(best)[1:]} changed most: how it treats {name}"


def _name(one: RankedChange) -> str:
    return one.direction if one.kind == "pc" else f"{one.kind} {one.direction}"


def _first(result: WeightsAnalysis) -> RankedChange | None:
    """The strongest; outside attention by `excess`, since long outputs move most whatever was trained."""
    placed = [one for one in result.rankings if one.layer is not None]
    fair = [one for one in placed if one.measure == "excess" and result.analysis != "attention"]
    return min(fair or placed, key=lambda one: one.rank, default=None)


def _place(one: RankedChange) -> str:
    where = {"qk": "the attention (QK)", "vo": "the attention (VO)", "mlp": "the MLP"}.get(
        one.part, f"matrix {one.part}"
    )
    layer = "over the layers" if one.layer is None else f"of layer {one.layer}"
    return f"{where if one.head is None else f'head {one.head} in {where}'} {layer}"


def _answers(result: WeightsAnalysis) -> tuple[tuple[str, str, str, str], ...]:
    found = []
    best = _first(result)
    if best is not None:
        stands = abs(best.z) >= STANDS_OUT
        found.append(
            (
                "What stands out most?",
                "nothing" if result.identical else f"{_name(best)}, z {_signed(best.z)}",
                f"{best.measure.replace('_', ' ')} in {_place(best)}; z is uncertain by {fmt.number(best.z_error, 2)}",
                "good" if stands else "",
            )
        )
    for one in _main_focus(result):
        found.append(
            (
                f"Where is the largest change {_HOW[one.measure]}{_matrix(one)}?",
                "nowhere" if result.identical else f"layer {one.layer}",
                f"{one.part}: {fmt.number(one.value)} a direction, {fmt.number(one.control_value)} a control"
                + ("" if one.next_layer is None else f"; next is layer {one.next_layer}"),
                "",
            )
        )
    whole = [one for one in result.tests if one.layer is None] or list(result.tests)
    if whole:
        sure = min(whole, key=lambda one: (one.q, -abs(one.t)))
        more = sure.first if sure.t > 0 else sure.second
        found.append(
            (
                f"Do {sure.first}s and {sure.second}s differ?",
                f"{more}s change more" if sure.q < 0.05 else "not measurably",
                f"{sure.part} {sure.measure.replace('_', ' ')}: t {fmt.number(sure.t)}, q {fmt.number(sure.q)}, "
                f"g {fmt.number(sure.effect)}",
                "",
            )
        )
    found += _special(result)
    return tuple(found)


def _matrix(one: FocusLayer) -> str:
    return "" if one.part in ("qk", "vo", "mlp") else f" of {one.part}"


def _main_focus(result: WeightsAnalysis) -> Sequence[FocusLayer]:
    """Two at most: those that name the analysis, or the matrices that changed most beyond the controls."""
    if result.analysis != "susceptibility":
        return [one for one in result.focus if one.measure != "promotion"]
    return sorted(result.focus, key=lambda one: one.control_value - one.value)[:2]


def _special(result: WeightsAnalysis) -> list[tuple[str, str, str, str]]:
    rows = [one for one in result.components if one.number == 1]
    if not rows or result.identical:
        return []
    first = rows[0]
    group = [one for one in result.components if (one.part, one.measure) == (first.part, first.measure)]
    rho = next((c for m, p, c in result.variance_against_effect if (p, m) == (first.part, first.measure)), math.nan)
    return [
        (
            "Is PC1 special?",
            f"number {first.rank} of {len(group)}",
            f"by mean |z| of {first.part} {first.measure.replace('_', ' ')}; variance explained against effect: rank "
            f"correlation {fmt.number(rho, 2)}",
            "",
        )
    ]


def _tables(result: WeightsAnalysis) -> Iterable[Table]:
    yield Table(
        anchor="rankings",
        title="Rankings",
        finding=(
            "The strongest of every measure and part, by z; its error comes from the number of controls. A minus "
            "before a direction: its opposite was put in."
        ),
        heads=("direction", "kind", "part", "measure", ">layer", ">head", ">base", ">tuned", ">change", ">z", ">error"),
        rows=tuple(_ranked(one) for one in result.rankings[:MAX_ROWS]),
        left_out=max(0, len(result.rankings) - MAX_ROWS),
    )
    yield Table(
        anchor="directions",
        title="Directions",
        finding="Over the layers: mean and spread of each direction's change, and the layer where it stands out most.",
        heads=("direction", "kind", "part", "measure", ">rank", ">mean change", ">std", ">mean z", ">peak layer",
               ">change there", ">z there"),
        rows=tuple(
            (one.direction, one.kind, one.part, one.measure.replace("_", " "), str(one.rank), fmt.number(one.mean),
             fmt.number(one.std), fmt.number(one.mean_z), str(one.peak_layer), _signed(one.peak), _signed(one.peak_z))
            for one in sorted(result.profiles_of_directions, key=lambda one: one.rank)[:MAX_ROWS]
        ),
        left_out=max(0, len(result.profiles_of_directions) - MAX_ROWS),
    )  # fmt: skip
    yield _pairs(
        "pairs",
        "Interactions",
        "Strengthened at the top, weakened at the bottom. qk: a query along the first and a key along the second; "
        "vo and mlp: the first is read, the second is written.",
        result.interactions,
    )
    yield _pairs(
        "both-ways",
        "Components both ways",
        "What each component was most strengthened and most weakened with where its part changed most, first as what "
        "queries or is read, then as the key or what is written.",
        result.component_interactions,
    )
    yield Table(
        anchor="components",
        title="Components",
        finding="Variance explained beside effect: the mean of |z| over the layers.",
        heads=("component", "part", "measure", ">variance", ">mean |z|", ">rank"),
        rows=tuple(
            (f"PC{one.number}", one.part, one.measure.replace("_", " "), fmt.percent(one.variance),
             fmt.number(one.effect), str(one.rank))
            for one in result.components
        ),
    )  # fmt: skip
    yield Table(
        anchor="groups",
        title="Groups",
        finding="Welch's t of roles against traits; q is p adjusted for all tests of this run, g is Hedges'.",
        heads=("part", "measure", ">layer", ">mean, first", ">std", ">mean, second", ">std", ">t", ">q", ">g"),
        rows=tuple(
            (one.part, one.measure.replace("_", " "), _layer(one.layer), fmt.number(one.first_mean),
             fmt.number(one.first_std), fmt.number(one.second_mean), fmt.number(one.second_std), _signed(one.t),
             fmt.number(one.q), _signed(one.effect))
            for one in sorted(result.tests, key=lambda one: one.q)[:MAX_ROWS]
        ),
        left_out=max(0, len(result.tests) - MAX_ROWS),
    )  # fmt: skip
    matrices = sorted(result.matrices, key=lambda one: -one.relative)
    yield Table(
        anchor="matrices",
        title="Matrices",
        finding="Whole matrices: length of the change, its largest singular value, its spread over directions.",
        heads=("matrix", ">layer", ">rows", ">columns", ">|change| / |base|", ">1 - cosine", ">largest singular value",
               ">error", ">effective rank"),
        rows=tuple(
            (one.matrix, str(one.layer), f"{one.rows:,}", f"{one.columns:,}", fmt.number(one.relative),
             fmt.number(max(0.0, 1 - one.cosine)), fmt.number(one.spectral[0] if one.spectral else 0.0),
             fmt.number(one.spectral_error, 2), fmt.number(one.effective_rank))
            for one in matrices[:MAX_ROWS]
        ),
        left_out=max(0, len(matrices) - MAX_ROWS),
    )  # fmt: skip
    yield Table(
        anchor="norms",
        title="Norms",
        finding="The weights of the norms: how far they moved, and the one factor that explains most of it.",
        heads=("norm", ">layer", ">|change| / |base|", ">factor", ">angle"),
        rows=tuple(
            (one.norm, str(one.layer), fmt.number(one.relative), fmt.number(one.scale, 4), fmt.number(one.angle))
            for one in sorted(result.norms, key=lambda one: -one.relative)[:MAX_ROWS]
        ),
    )


def _pairs(anchor: str, title: str, finding: str, pairs: Sequence[Interaction]) -> Table:
    heads = ("first", "kind", "second", "kind", "part", ">layer", ">base", ">tuned", ">change", ">z", ">error")
    rows = tuple(
        (one.first, one.first_kind, one.second, one.second_kind, one.part, _layer(one.layer), fmt.number(one.base),
         fmt.number(one.tuned), _signed(one.delta), _signed(one.z), fmt.number(one.z_error, 2))
        for one in pairs[:MAX_ROWS]
    )  # fmt: skip
    return Table(
        anchor=anchor, title=title, finding=finding, heads=heads, rows=rows, left_out=max(0, len(pairs) - MAX_ROWS)
    )


def _ranked(one: RankedChange) -> Row:
    return (
        one.direction if one.sign > 0 else f"-{one.direction}",
        one.kind,
        one.part,
        one.measure.replace("_", " "),
        _layer(one.layer),
        "" if one.head is None else str(one.head),
        fmt.number(one.base),
        fmt.number(one.tuned),
        _signed(one.delta),
        _signed(one.z),
        fmt.number(one.z_error, 2),
    )


def _layer(layer: int | None) -> str:
    return "mean" if layer is None else str(layer)


def _signed(value: float) -> str:
    return fmt.signed(value)
