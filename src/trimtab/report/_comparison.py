"""What the pages of a comparison say, as plain dataclasses: text and HTML render the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.report import _format as fmt
from trimtab.results import Comparison, LedgerEntry, LedgerGroup, RecordVerdict, SideCount

MAX_ROWS = 1000
"""Rows of the tables of verdicts and ledger entries in a page; the JSON report holds all of them."""
MAX_POINTS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictLine:
    """One matched pair, formatted; `waived` names the waiver that let it pass."""

    name: str
    order: int
    status: str
    waived: str
    rel_l2: str
    cosine: str
    max_abs: str
    ratio: str
    excess: str
    ulp: str
    dtypes: str
    reasons: tuple[str, ...]
    fingerprints: tuple[tuple[str, str, str], ...]
    """(kind, detail, share of the squared error that it explains)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The first divergence: a sentence and its facts."""

    name: str
    sentence: str
    facts: tuple[tuple[str, str], ...]
    fingerprints: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One pair in the chart of errors, in the chart's own units."""

    x: float
    y: float
    status: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """rel_l2 of every read pair in the order of the reference, on a log axis of 800 x 200 units."""

    points: tuple[Point, ...]
    ticks: tuple[tuple[float, str], ...]
    mark: float | None
    shown: int
    total: int
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonView:
    """Everything that a page about a `Comparison` says."""

    answers: tuple[tuple[str, str, str, str], ...]
    """(question, short answer, detail, tone)."""
    divergence: Divergence | None
    chart: Chart | None
    verdicts: tuple[VerdictLine, ...]
    verdicts_left_out: int
    sides: tuple[tuple[str, tuple[str, ...]], ...]
    groups: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...]
    entries: tuple[LedgerEntry, ...]
    entries_left_out: int


def view(comparison: Comparison) -> ComparisonView:
    """Read a comparison into sentences and table rows."""
    order = sorted(comparison.records, key=lambda one: (one.passing, one.order))
    short = [group for group in comparison.ledger.groups if _is_short(group)]
    return ComparisonView(
        answers=_answers(comparison),
        divergence=_divergence(comparison),
        chart=_chart(comparison),
        verdicts=tuple(map(_line, order[:MAX_ROWS])),
        verdicts_left_out=max(0, len(order) - MAX_ROWS),
        sides=(
            ("reference", _side(comparison.ledger.reference)),
            ("candidate", _side(comparison.ledger.candidate)),
        ),
        groups=tuple(
            (group.axis, group.value, _side(group.reference), _side(group.candidate)) for group in short[:MAX_ROWS]
        ),
        entries=comparison.ledger.entries[:MAX_ROWS],
        entries_left_out=max(0, len(comparison.ledger.entries) - MAX_ROWS),
    )


def _answers(comparison: Comparison) -> tuple[tuple[str, str, str, str], ...]:
    counts = comparison.counts
    total = len(comparison.records)
    fine = sum(record.passing for record in comparison.records)
    detail = ", ".join(f"{number:,} {status}" for status, number in counts.items() if number) or "no pair"
    first = comparison.first_divergence
    ledger = comparison.ledger
    expected = "unknown" if ledger.reference.expected is None else f"{ledger.reference.expected:,}"
    return (
        (
            "Do the pairs agree?",
            f"{fine:,} of {total:,} pairs pass" if total else "Nothing was compared",
            detail,
            "good" if total and fine == total else "bad",
        ),
        (
            "Where is the first divergence?",
            "Nowhere" if first is None else first.key.tensor,
            "no pair fails" if first is None else first.text,
            "good" if first is None else "bad",
        ),
        (
            "Was everything compared?",
            "Yes" if ledger.complete else "No",
            f"{ledger.reference.compared:,} {ledger.unit} of the reference compared, expected {expected}",
            "good" if ledger.complete else "bad",
        ),
    )


def _divergence(comparison: Comparison) -> Divergence | None:
    first = comparison.first_divergence
    if first is None:
        return None
    record = next((one for one in comparison.records if one.key == first.key), None)
    facts = [
        ("status", first.status),
        ("position", "" if first.position is None else str(first.position)),
        ("index", str(list(first.index)) if first.index else ""),
        ("reference", _value(first.reference)),
        ("candidate", _value(first.candidate)),
        ("row error", fmt.number(first.row_error)),
        ("noise ratio", "" if first.noise_ratio is None else fmt.number(first.noise_ratio)),
    ]
    return Divergence(
        name=first.key.text,
        sentence=first.reason,
        facts=tuple((name, value) for name, value in facts if value),
        fingerprints=_fingerprints(record) if record else (),
    )


def _value(value: float | None) -> str:
    return "" if value is None else fmt.number(value, digits=6)


def _fingerprints(record: RecordVerdict) -> tuple[tuple[str, str, str], ...]:
    return tuple((one.kind, one.detail, fmt.percent(one.explained)) for one in record.fingerprints)


def _line(record: RecordVerdict) -> VerdictLine:
    metrics, calibration = record.metrics, record.calibration
    zero = "0" if record.status == "identical" else fmt.MISSING
    same = record.dtype_reference == record.dtype_candidate
    return VerdictLine(
        name=record.key.text,
        order=record.order,
        status=record.status,
        waived=record.waived_by or "",
        rel_l2=fmt.number(metrics.rel_l2) if metrics else zero,
        cosine=fmt.number(metrics.cosine_min, 6) if metrics else fmt.MISSING,
        max_abs=fmt.number(metrics.max_abs) if metrics else zero,
        ratio=fmt.number(calibration.median) if calibration else fmt.MISSING,
        excess=fmt.number(calibration.excess) if calibration else fmt.MISSING,
        ulp=fmt.number(record.max_ulp),
        dtypes=record.dtype_reference if same else f"{record.dtype_reference}, {record.dtype_candidate}",
        reasons=(*record.reasons, *record.warnings),
        fingerprints=_fingerprints(record),
    )


def _side(side: SideCount) -> tuple[str, ...]:
    expected = "unknown" if side.expected is None else f"{side.expected:,}"
    return (expected, *(f"{n:,}" for n in (side.found, side.compared, side.unmatched, side.skipped, side.corrupt)))


def _is_short(group: LedgerGroup) -> bool:
    return any(
        side.unmatched or side.skipped or side.corrupt or side.compared < (side.expected or 0)
        for side in (group.reference, group.candidate)
    )


def _chart(comparison: Comparison) -> Chart | None:
    """Evenly thinned to `MAX_POINTS`, failing pairs always kept; pairs that are equal or not finite have no place."""
    read: list[tuple[RecordVerdict, float]] = [
        (record, record.metrics.rel_l2)
        for record in sorted(comparison.records, key=lambda one: one.order)
        if record.metrics is not None and math.isfinite(record.metrics.rel_l2) and record.metrics.rel_l2 > 0
    ]
    if len(read) < 3:
        return None
    stride = max(1, len(read) // MAX_POINTS)
    drawn = [(i, *pair) for i, pair in enumerate(read) if i % stride == 0 or not pair[0].passing]
    drawn = drawn[: 2 * MAX_POINTS]
    least, most = min(error for _, error in read), max(error for _, error in read)
    low = math.floor(math.log10(least))
    high = max(math.ceil(math.log10(most)), low + 1)

    def height(error: float) -> float:
        return round(200 * (high - math.log10(error)) / (high - low), 2)

    thin = max(1, -(-(high - low) // 5))
    first = comparison.first_divergence
    mark = next((i for i, (record, _) in enumerate(read) if first is not None and record.key == first.key), None)
    width = 800 / max(1, len(read) - 1)
    return Chart(
        points=tuple(
            Point(
                x=round(i * width, 2), y=height(error), status=_tone(one), text=f"{one.key.text}: {fmt.number(error)}"
            )
            for i, one, error in drawn
        ),
        ticks=tuple((height(10.0**k), fmt.number(10.0**k, 1)) for k in range(low, high + 1, thin)),
        mark=None if mark is None else round(mark * width, 2),
        shown=len(drawn),
        total=len(comparison.records),
        description=f"rel_l2 of {len(read):,} pairs in execution order: {fmt.number(least)} to {fmt.number(most)}",
    )


def _tone(record: RecordVerdict) -> str:
    return {"failed": "failed", "corrupt": "failed", "inconclusive": "between"}.get(record.status, "passed")
