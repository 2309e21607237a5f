"""What the pages of a triage say, as plain dataclasses: text and HTML render the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.results.triage import HeatCell, Hunk, ModuleCall, TokenStrip, Triage

MAX_CALLS = 60
"""Calls that are drawn and listed, those around the divergence; the JSON report holds more."""
LEVELS = 8
"""Steps of the colour ramp: rel_l2 below 1e-7, below 1e-6, ..., below 1e-1, and from there."""
_PASSES = {"forward": "forward pass", "backward": "backward pass", "update": "weights and optimizer"}
_TONES = {"none": "good", "equivalent": "neutral", "minor": "neutral", "significant": "bad", "severe": "bad"}
_SEVERITY = {
    "none": "nothing diverges",
    "equivalent": "rel_diff below 1e-5",
    "minor": "rel_diff from 1e-5 to 1e-3",
    "significant": "rel_diff from 1e-3 to 0.1",
    "severe": "rel_diff from 0.1, or beyond measure",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One field of a heat map or strip."""

    look: str
    """Class of its colour: `l0` to `l7`, `same`, `nonfinite` or `empty`."""
    text: str
    width: int = 1
    first: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """Layers across, tensors down, of one pass."""

    title: str
    first: bool
    """Whether the divergence lies in this pass."""
    layers: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """Errors of one tensor along its rows."""

    name: str
    cells: tuple[Cell, ...]
    worst: str
    first: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One module call in the chart of amplification, in the chart's own units."""

    x: float
    below: float
    """Where the input error lies."""
    above: float
    """Where the output error lies."""
    status: str
    first: bool
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Input and output errors of calls in causal order, on a log axis of 800 x 220 units."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CallLine:
    """One module call, formatted."""

    name: str
    module_class: str
    direction: str
    input_error: str
    output_error: str
    expected: str
    amplification: str
    status: str
    first: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TriageView:
    """Everything that a page about a `Triage` says."""

    headline: str
    answers: tuple[tuple[str, str, str, str], ...]
    """(question, short answer, detail, tone)."""
    facts: tuple[tuple[str, str], ...]
    fingerprints: tuple[tuple[str, str, str], ...]
    heats: tuple[Heat, ...]
    """The pass of the divergence first."""
    chart: Chart | None
    strips: tuple[Strip, ...]
    strip_rows: str
    calls: tuple[CallLine, ...]
    calls_left_out: int
    hunks: tuple[tuple[str, Hunk], ...]
    """(where it lies, the hunk)."""
    followers: tuple[tuple[str, str, str, str], ...]


def view(triage: Triage) -> TriageView:
    """Read a triage into sentences, figures and table rows."""
    near = _near(triage)
    return TriageView(
        headline=_headline(triage),
        answers=_answers(triage),
        facts=_facts(triage),
        fingerprints=tuple(
            (one.kind, one.detail, fmt.percent(one.explained))
            for one in (triage.divergence.fingerprints if triage.divergence else ())
        ),
        heats=tuple(
            sorted(
                (_heat(triage, name) for name in _PASSES if any(one.direction == name for one in triage.heat)),
                key=lambda one: not one.first,
            )
        ),
        chart=_chart(triage, near),
        strips=tuple(_strip(one, triage) for one in triage.strips),
        strip_rows=_strip_rows(triage.strips),
        calls=tuple(_call_line(one, triage) for one in near),
        calls_left_out=len(triage.calls) - len(near) + triage.calls_left_out,
        hunks=_hunks(triage),
        followers=tuple(
            (one.tensor, fmt.number(one.before), fmt.number(one.after), one.status)
            for one in (triage.transplant.followers if triage.transplant else ())
        )[:MAX_CALLS],
    )


def _headline(triage: Triage) -> str:
    found = triage.divergence
    if found is None:
        return triage.reason
    head, _, _ = triage.reason.partition(": ")
    return f"The {head[4:]}" if head.startswith("the ") else head  # names of modules keep their case


def _answers(triage: Triage) -> tuple[tuple[str, str, str, str], ...]:
    found = triage.divergence
    if found is None:
        short = "Nothing diverges" if triage.passed else "Not complete"
        return (("Where does the candidate diverge?", short, triage.reason, "good" if triage.passed else "bad"),)
    where = found.where.text if found.where is not None else ""
    amplified = f"{fmt.number(found.amplification)} times what came in" if found.sentence else ""
    proof = ""
    if triage.transplant is not None:
        moved = triage.transplant
        proof = "proved by a transplant" if moved.agrees and moved.reproduced else moved.reason
    cause = "other settings" if triage.likely_cause else "not recognised"
    stepped = found.origin == "optimizer" and any(one.group == "optimizer" for one in triage.manifest)
    if found.fingerprints and not stepped:
        cause = found.fingerprints[0].kind.replace("_", " ")
    elif found.origin == "inputs":
        cause = "other inputs"
    elif triage.fix:
        cause = "a change of its source"
    return (
        (
            "What made the error?",
            found.module_path or found.key.tensor,
            "; ".join(one for one in (_origin(found.origin), found.module_class, where, proof) if one),
            "bad",
        ),
        (
            "How bad is it?",
            triage.severity,
            f"{_SEVERITY[triage.severity]}; {amplified}",
            _TONES[triage.severity],
        ),
        ("What is the likely cause?", cause, triage.likely_cause or "no known kind of mistake fits", "neutral"),
        (
            "What is next?",
            "Apply the patch" if triage.fix and triage.fix.proved else "Check first",
            triage.next_check,
            "neutral",
        ),
    )


def _origin(origin: str) -> str:
    return {
        "module": "made inside of this module",
        "between": "made by the code between the modules inside of it",
        "weights": "its weights differ",
        "parameter_gradient": "its parameter gradient is wrong",
        "optimizer": "its update is another one",
        "inputs": "the runs were given other inputs",
        "value": "a recorded value",
        "tensor": "a tensor recorded by name",
    }[origin]


def _facts(triage: Triage) -> tuple[tuple[str, str], ...]:
    found = triage.divergence
    if found is None:
        return ()
    ranks = ", ".join(map(str, found.ranks))
    pairs = [
        ("first wrong tensor", found.key.text),
        ("pass", found.direction),
        ("last that agrees", found.after),
        ("first that fails", found.first_shown if found.first_shown != found.key.text else ""),
        ("rows", found.where.text if found.where is not None else ""),
        ("ranks", f"{ranks} differ, {', '.join(map(str, found.ranks_agreeing))} agree" if found.ranks_agreeing else ""),
        ("input error", fmt.number(found.input_error)),
        ("output error", fmt.number(found.output_error)),
        ("rounding explains", fmt.number(found.expected)),
        ("amplification", fmt.number(found.amplification)),
        ("pairs that fail", f"{triage.failing:,} of {triage.pairs:,}"),
    ]
    return tuple((name, value) for name, value in pairs if value and value != fmt.MISSING)


def look(error: float, status: str = "") -> str:
    """Return the colour class of an error."""
    if status == "identical" or error == 0:
        return "same"
    if not math.isfinite(error):
        return "nonfinite"
    return f"l{min(max(math.floor(math.log10(error)) + LEVELS, 0), LEVELS - 1)}"


def _heat(triage: Triage, direction: str) -> Heat:
    found = triage.divergence
    mine = [one for one in triage.heat if one.direction == direction]
    layers = sorted({one.layer for one in mine}, key=lambda one: (one != "", int(one) if one else 0))
    names = list(dict.fromkeys(one.tensor for one in mine))
    cells = {(one.tensor, one.layer): one for one in mine}
    own = "" if found is None or found.direction != direction else found.key.tensor.removeprefix("module:")

    def cell(name: str, at: str) -> Cell:
        one: HeatCell | None = cells.get((name, at))
        if one is None:
            return Cell(look="empty", text="")
        first = own.endswith(f".{at}.{name}") if at else own == name
        where = f"layer {at}, " if at else ""
        return Cell(look=look(one.error, one.status), text=f"{where}{name}: {fmt.number(one.error)}", first=first)

    return Heat(
        title=_PASSES[direction],
        first=found is not None and found.direction == direction,
        layers=tuple(layers),
        rows=tuple((name, tuple(cell(name, at) for at in layers)) for name in names),
    )


def _strip(strip: TokenStrip, triage: Triage) -> Strip:
    """Neighbours of one colour are one field."""
    cells: list[Cell] = []
    start = 0
    looks = [look(one) for one in strip.errors]
    for at in range(1, len(looks) + 1):
        if at < len(looks) and looks[at] == looks[start]:
            continue
        rows = (start * strip.rows_per_cell, at * strip.rows_per_cell - 1)
        which = f"row {rows[0]}" if rows[0] == rows[1] else f"rows {rows[0]}-{rows[1]}"
        worst = max(strip.errors[start:at])
        cells.append(Cell(look=looks[start], text=f"{which}: at most {fmt.number(worst)}", width=at - start))
        start = at
    first = triage.divergence is not None and strip.tensor == triage.divergence.key.tensor
    worst = max(strip.errors, default=0.0)
    return Strip(name=strip.tensor.removeprefix("module:"), cells=tuple(cells), worst=fmt.number(worst), first=first)


def _strip_rows(strips: tuple[TokenStrip, ...]) -> str:
    if not strips:
        return ""
    longest = max(strips, key=lambda one: len(one.errors))
    rows = len(longest.errors) * longest.rows_per_cell
    each = "" if longest.rows_per_cell == 1 else f", {longest.rows_per_cell} rows to a field, of which the worst counts"
    return f"{rows:,} rows from left to right{each}"


def _near(triage: Triage) -> tuple[ModuleCall, ...]:
    at = next((i for i, one in enumerate(triage.calls) if _is_first(one, triage)), None)
    if at is None:
        order = triage.divergence.key if triage.divergence else None
        at = next((i for i, one in enumerate(triage.calls) if one.status != "agrees" and order), 0)
    start = max(0, min(at - MAX_CALLS // 2, len(triage.calls) - MAX_CALLS))
    return triage.calls[start : start + MAX_CALLS]


def _is_first(call: ModuleCall, triage: Triage) -> bool:
    found = triage.divergence
    return (
        found is not None
        and call.module_path == found.module_path
        and call.direction == found.direction
        and call.call_index == found.key.call_index
    )


def _call_line(call: ModuleCall, triage: Triage) -> CallLine:
    return CallLine(
        name=call.module_path or "the model",
        module_class=call.module_class,
        direction=call.direction,
        input_error=fmt.number(call.input_error),
        output_error=fmt.number(call.output_error),
        expected=fmt.number(call.expected),
        amplification=fmt.number(call.amplification),
        status=call.status,
        first=_is_first(call, triage),
    )


def _chart(triage: Triage, calls: tuple[ModuleCall, ...]) -> Chart | None:
    sizes = [one for call in calls for one in (call.input_error or 0.0, call.output_error) if 0 < one < math.inf]
    if len(calls) < 2 or not sizes:
        return None
    low = min(math.floor(math.log10(min(sizes))), math.floor(math.log10(max(sizes))) - 1)
    high = max(math.ceil(math.log10(max(sizes))), low + 1)

    def height(error: float) -> float:
        if error <= 0:
            return 220.0
        return round(220 * (high - min(math.log10(error), high)) / (high - low), 2) if math.isfinite(error) else 0.0

    width = 800 / len(calls)
    thin = max(1, -(-(high - low) // 5))
    bars = tuple(
        Bar(
            x=round((index + 0.5) * width, 2),
            below=height(call.input_error or 0.0),
            above=height(call.output_error),
            status=call.status,
            first=_is_first(call, triage),
            text=f"{call.module_path}: {fmt.number(call.input_error)} in, {fmt.number(call.output_error)} out, "
            f"{fmt.number(call.amplification)} times",
        )
        for index, call in enumerate(calls)
    )
    return Chart(
        bars=bars,
        ticks=tuple((height(10.0**k), fmt.number(10.0**k, 1)) for k in range(low, high + 1, thin)),
        description=f"Relative error into and out of {len(calls)} module calls in the order of execution",
    )


def _hunks(triage: Triage) -> tuple[tuple[str, Hunk], ...]:
    if triage.source is None:
        return ()
    own = [
        (
            "in the suspect's code"
            if one.distance == 0
            else f"{fmt.count(one.distance, 'line')} from the suspect's code",
            one,
        )
        for one in triage.source.hunks
    ]
    return (*own, *((one.file, one) for one in triage.source.elsewhere))
