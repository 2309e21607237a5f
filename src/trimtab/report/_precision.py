"""What a precision report says: the range of every tensor beside that of its dtype; text and HTML from one view."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.report import _html
from trimtab.report._console import TextPage
from trimtab.results.sae_evaluation import PrecisionReport, TensorRange

_LIMITS = {
    "float16": (5.960464477539063e-08, 6.103515625e-05, 65504.0),
    "bfloat16": (9.183549615799121e-41, 1.1754943508222875e-38, 3.3895313892515355e38),
    "float32": (1.401298464324817e-45, 1.1754943508222875e-38, 3.4028234663852886e38),
    "float64": (4.9406564584124654e-324, 2.2250738585072014e-308, 1.7976931348623157e308),
}
"""Smallest above 0, smallest of full precision, largest."""
HEADS = (
    "tensor", "role", "dtype", ">smallest", ">rms", ">largest", ">zeros", ">underflow", ">subnormal", ">overflow",
)  # fmt: skip
_LOW, _HIGH = -12.0, 6.0
"""Decades that the drawing spans."""
ROW, WIDTH = 20.0, 420.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One tensor on the axis of magnitudes."""

    name: str
    y: float
    x: float
    width: float
    """0: all its elements are 0."""
    dot: float
    """Its rms."""
    tone: str
    title: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionView:
    """Everything that is said about a `PrecisionReport`."""

    kicker: str
    headline: str
    lede: str
    passed: bool
    answers: tuple[tuple[str, str, str, str], ...]
    bars: tuple[Bar, ...]
    height: float
    x_ticks: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, str, str], ...]
    """(x, label, kind): limits of the compute dtype."""
    rows: tuple[tuple[str, ...], ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def precision_view(result: PrecisionReport) -> PrecisionView:
    """Read a report into sentences, bars and rows."""
    worst = max(result.tensors, key=lambda one: one.underflow, default=None)
    over = [one for one in result.tensors if one.overflow > 0]
    pair = f"{result.dtype} stored, {result.compute} computed"
    limits = _LIMITS.get(result.compute, _LIMITS["float32"])
    shown = [(math.log10(limits[0]), "smallest", "edge"), (math.log10(limits[1]), "full precision", "soft"),
             (math.log10(limits[2]), "largest", "edge")]  # fmt: skip
    return PrecisionView(
        kicker=f"Precision of a {result.architecture} of {result.d_in} to {result.d_sae:,} latents",
        headline=f"{pair}: {'fits' if result.passed else 'does not fit'}",
        lede=f"{result.reason[:1].upper()}{result.reason[1:]}. "
        f"{fmt.count(result.batches, 'batch', 'batches')} of {result.batch_size:,} activations.",
        passed=result.passed,
        answers=(
            (
                "Does anything overflow?",
                f"{len(over)} of {fmt.count(len(result.tensors), 'tensor')}",
                ", ".join(f"{one.name} {fmt.percent(one.overflow)}" for one in over[:4]) or "every magnitude is held",
                "bad" if over else "good",
            ),
            (
                "What underflows?",
                "nothing"
                if worst is None or worst.underflow == 0
                else f"{fmt.percent(worst.underflow)} of {worst.name}",
                "the largest share of elements other than 0 that become 0",
                "bad" if worst is not None and worst.underflow > 0.01 else "good",
            ),
            (
                "Which gradient scale?",
                _power(result.recommended_g),
                f"in use: {_power(result.scales.get('g', 1.0))}",
                "neutral",
            ),
        ),
        bars=tuple(_bar(index, one) for index, one in enumerate(result.tensors)),
        height=ROW * len(result.tensors),
        x_ticks=tuple((_across(place), f"1e{place:g}" if place else "1") for place in range(-12, 7, 3)),
        marks=tuple((_across(x), label, kind) for x, label, kind in shown if _LOW <= x <= _HIGH),
        rows=tuple(map(_row, result.tensors)),
        facts=tuple((name, _power(value)) for name, value in result.scales.items()),
        notes=result.warnings,
    )


def render(result: PrecisionReport) -> str:
    """Return the page."""
    made = precision_view(result)
    return _html._page(
        "precision.html.j2",
        scripts={},
        style=_html._asset("report.css") + _html._asset("sae.css"),
        title=made.headline,
        created="",
        sections=[("answer", "Answer"), ("ranges", "Ranges"), ("record", "Figures")],
        view=made,
        heads=HEADS,
    )


def render_text(result: PrecisionReport, *, width: int, color: bool) -> str:
    """Return the text form."""
    made = precision_view(result)
    page = TextPage(width, color)
    page.line(made.headline, "bold")
    page.line(made.lede, "dim")
    page.line("")
    for question, short, detail, tone in made.answers:
        page.item(f"{question} {short}", detail, {"good": "green", "bad": "red"}.get(tone, ""))
    page.table("Tensors", HEADS, made.rows)
    page.line("")
    page.lines((f"note: {one}" for one in made.notes), "yellow")
    page.facts({f"scale {name}": value for name, value in made.facts})
    return page.text()


def _across(decade: float) -> float:
    return round((min(max(decade, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW) * WIDTH, 1)


def _bar(index: int, one: TensorRange) -> Bar:
    def place(value: float) -> float:
        return _across(math.log10(value)) if value > 0 and math.isfinite(value) else WIDTH * (value > 0)

    left, right = place(one.absmin), place(one.absmax)
    lost = one.overflow > 0
    return Bar(
        name=one.name,
        y=index * ROW + ROW / 2,
        x=left,
        width=max(2.0, right - left) if one.absmax else 0.0,
        dot=place(one.rms),
        tone="bad" if lost else "warn" if one.underflow > 0.01 else "good",
        title=f"{one.name}: {fmt.number(one.absmin)} to {fmt.number(one.absmax)}, rms {fmt.number(one.rms)}",
    )


def _row(one: TensorRange) -> tuple[str, ...]:
    figures = (fmt.number(value) for value in (one.absmin, one.rms, one.absmax))
    shares = (fmt.percent(value) for value in (one.zeros, one.underflow, one.subnormal, one.overflow))
    return (one.name, one.role, one.dtype, *figures, *shares)


def _power(value: float) -> str:
    """A power of two by its exponent, any other number as it is."""
    if value > 0 and math.isfinite(value) and math.frexp(value)[0] == 0.5:
        exponent = math.frexp(value)[1] - 1
        return "1" if exponent == 0 else f"2^{exponent} ({fmt.number(value)})"
    return fmt.number(value)
