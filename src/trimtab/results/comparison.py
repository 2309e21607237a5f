"""What a comparison of two traces found: verdicts, metrics, the first divergence, and the ledger."""

from __future__ import annotations

import html
import math
from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from trimtab.results._lazy import LazySequence

if TYPE_CHECKING:
    import polars as pl

COMPARISON_VERSION = 1  # 1: first version

Status = Literal["identical", "passed", "inconclusive", "failed", "corrupt"]
Side = Literal["reference", "candidate", "both"]
EntryKind = Literal["missing", "unmatched", "skipped", "corrupt", "incomplete", "inconclusive", "failed", "replica"]
Number = int | float


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordKey:
    """The identity by which records of two traces match; what an identity does not use is empty."""

    site: str = ""
    name: str = ""
    layer: int | None = None
    phase: str = ""
    step: int = 0
    micro_step: int = 0
    rank: int | None = None
    """None for rows of a generation: they match whichever process held them."""
    call_index: int = 0
    kind: str = "value"
    edit: str = "none"
    recompute: bool = False
    config: str = ""
    """The configuration by which rows match; empty when each side has one."""
    prompt: int | None = None
    request: str | None = None
    occurrence: int = 0
    """Which of several records with otherwise equal identity, in the order they were written."""
    coordinates: str = ""
    """The place in a parallel run of which nothing says how it joins the others, such as "dp=1"."""

    @property
    def tensor(self) -> str:
        """The tensor's own name: its site, or the name it was dumped under."""
        return self.site or self.name

    @property
    def text(self) -> str:
        """One line that names this record; waivers match against it."""
        parts = [self.tensor, f"layer={self.layer}" if self.layer is not None and not self.site else ""]
        if self.prompt is not None:
            parts.append(f"prompt={self.prompt} request={self.request}")
        else:
            parts.append(f"phase={self.phase} step={self.step}")
            parts.append(f"micro_step={self.micro_step}" if self.micro_step else "")
            parts.append(f"rank={self.rank}" if self.rank is not None else "")
            parts.append(self.coordinates)
        parts.append(f"config={self.config}" if self.config else "")
        parts.append(f"edit={self.edit}" if self.edit != "none" else "")
        parts.append(f"kind={self.kind}" if self.kind != "value" else "")
        parts.append(f"call={self.call_index}" if self.call_index else "")
        parts.append("recompute" if self.recompute else "")
        parts.append(f"occurrence={self.occurrence}" if self.occurrence else "")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """One fused pass over a pair of tensors; sums in float64 over the elements that are finite on both sides."""

    numel: int
    rows: int
    mae: float
    rmse: float
    max_abs: float
    max_abs_index: tuple[int, ...]
    max_abs_reference: Number
    max_abs_candidate: Number
    rel_l2: float
    rel_diff: float
    cosine: float
    """Mean over rows; `cosine_min` is the smallest."""
    cosine_min: float
    slope: float
    """Least squares candidate ~ slope * reference."""
    mean_reference: float
    mean_candidate: float
    nan_reference: int
    nan_candidate: int
    inf_reference: int
    inf_candidate: int
    nonfinite_match: bool
    worst_row: int
    worst_row_error: float
    """|a - r| / max(|r|, 0.01 rms row norm) of the worst row."""
    worst_channel: int
    worst_channel_rms: float
    differing: int | None = None
    """How many elements differ; counted for integers and booleans only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How the calibrated verdict was reached; a ratio over its limit is what failed."""

    expected: float
    """The relative row error e that rounding explains."""
    source: str
    """Where e comes from: "rounding model" or "noise run"."""
    dtype: str
    """The coarser dtype, whose unit roundoff enters e."""
    blocks: int
    """Blocks of roundings upstream that e assumes."""
    median: float
    """Median over rows of the noise ratio nu = row error / e."""
    median_limit: float
    worst: float
    worst_limit: float
    slope_deviation: float
    slope_limit: float
    mean_deviation: float
    """(mean candidate - mean reference) / rms of the reference."""
    mean_limit: float
    element: float
    """Worst element: |a - r| / (e max(|r|, rms of its row, rms of its channel))."""
    element_limit: float
    channel: float
    """Worst channel: its rms error over e times its own rms; 0 where no few channels hold the norm."""
    channel_limit: float
    systematic: bool
    excess: float
    """The largest ratio over its limit: at most 1 passes, above 2 fails. By this factor e would have to grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """A known kind of mistake that explains a difference."""

    kind: str
    detail: str
    explained: float
    """Share of the squared error that goes away when the mistake is undone; 1 is all of it."""
    value: float | None = None
    """The factor, the shift in tokens, the step distance: what the kind is about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """The smallest tolerances under which a pair would pass elementwise, each on its own."""

    absolute: float
    """max |a - r|."""
    relative: float
    """max |a - r| / |r|; inf where r is 0 and a is not."""
    both: float
    """The smallest t with |a - r| <= t + t |r| for every element: rtol = atol = t."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstElement:
    """One of the elements that differ most."""

    index: tuple[int, ...]
    """Coordinates in the tensor put together; in rows of a generation, the absolute position comes first."""
    reference: Number
    candidate: Number
    ranks: tuple[int, ...] = ()
    """Ranks of the candidate that held it (of the reference, where only that is shared out)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstRow:
    """One of the rows that differ most."""

    index: tuple[int, ...]
    """Coordinates of the row, or its absolute position."""
    error: float
    """|a - r| / max(|r|, 0.01 rms row norm)."""
    ranks: tuple[int, ...] = ()
    """Ranks that held its worst element."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardError:
    """The error in what one place of a parallel run held."""

    side: Literal["reference", "candidate"]
    """The side whose layout tells the places apart."""
    ranks: tuple[int, ...]
    """One, or several that hold terms of a sum; copies are compared on their own."""
    place: str
    """Coordinates, such as "tp=1"."""
    elements: int
    rel_l2: float
    share: float
    """Share of the pair's squared error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSeries:
    """Errors by row of one pair, kept when asked for."""

    positions: tuple[int, ...]
    error: tuple[float, ...]
    norm: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordVerdict:
    """One matched pair."""

    key: RecordKey
    status: Status
    order: int
    """The reference's running number of the first record in this pair."""
    reasons: tuple[str, ...] = ()
    dtype_reference: str = ""
    dtype_candidate: str = ""
    shape_reference: tuple[int, ...] = ()
    shape_candidate: tuple[int, ...] = ()
    rows: int = 0
    """Rows compared, for pairs matched by row."""
    metrics: Metrics | None = None
    """None when nothing was read: equal digests, or shapes that do not fit."""
    coarse: Metrics | None = None
    """The same after rounding both sides to the coarser dtype, when dtypes differ."""
    coarse_dtype: str | None = None
    calibration: Calibration | None = None
    severity: str | None = None
    """The band of a published scale, when a scale is the verdict."""
    max_ulp: int | None = None
    """Largest distance in representable steps of the coarser dtype; measured when the pair did not pass."""
    quantiles: tuple[float, ...] = ()
    """|a - r| at 0.5, 0.9, 0.99 and 0.999; measured when the pair did not pass (sampled above 4 M elements)."""
    fingerprints: tuple[Fingerprint, ...] = ()
    warnings: tuple[str, ...] = ()
    waived_by: str | None = None
    series: RowSeries | None = None
    ranks: tuple[int, ...] = ()
    """Ranks that held the worst element of a pair that did not pass."""
    shards: tuple[ShardError, ...] = ()
    """The error by place, where a pair that did not pass was put together from several."""
    tolerance: Tolerance | None = None
    """Measured when the pair did not pass, or was asked for."""
    worst_elements: tuple[WorstElement, ...] = ()
    """The elements that differ most, the worst first; measured when the pair did not pass."""
    worst_rows: tuple[WorstRow, ...] = ()

    @property
    def passing(self) -> bool:
        """Whether this pair lets the comparison pass."""
        return self.status in ("identical", "passed") or self.waived_by is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstDivergence:
    """The first failing row or record, in the order (step, position, layer, site) or the order of execution."""

    key: RecordKey
    status: Status
    order: int
    position: int | None
    """Absolute position of the row, for generations."""
    index: tuple[int, ...]
    """Coordinates of the worst element, in the row (generations) or in the record."""
    reference: Number | None
    candidate: Number | None
    row_error: float
    noise_ratio: float | None
    reason: str
    ranks: tuple[int, ...] = ()
    """Ranks that held the element, where the key does not say."""

    @property
    def text(self) -> str:
        """One sentence with the coordinates and both values."""
        where = f" position {self.position}" if self.position is not None else ""
        values = (
            f", reference {self.reference:.9g} candidate {self.candidate:.9g}" if self.reference is not None else ""
        )
        at = f" at {list(self.index)}" if self.index else ""
        held = f" on rank {' and '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"{self.key.text}{where}{at}{held}{values}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDivergence:
    """Where two free-running generations of one request part."""

    config: str
    prompt: int
    request: str
    position: int
    """The first position whose token ids differ; rows before it are comparable."""
    reference_id: int | None
    """None when this side had already stopped."""
    candidate_id: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SideCount:
    """Items of one side (rows of generations, records of dumps): found = compared + unmatched + skipped + corrupt."""

    expected: int | None
    """From the plan or the expectation file; None when nobody said."""
    found: int
    compared: int
    unmatched: int
    skipped: int
    corrupt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerGroup:
    """Counts of one step, rank or site."""

    axis: Literal["step", "rank", "site"]
    value: str
    reference: SideCount
    candidate: SideCount


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """Something short: what was not compared, on which side, and why."""

    side: Side
    kind: EntryKind
    name: str
    count: int
    reason: str
    waived_by: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """What was expected, compared, unmatched, skipped and corrupt, on both sides."""

    unit: str
    """What is counted: "rows", "records", or "rows and records"."""
    expectation: str
    """Where `expected` comes from, in words."""
    reference: SideCount
    candidate: SideCount
    groups: tuple[LedgerGroup, ...] = ()
    entries: tuple[LedgerEntry, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is short, waivers considered."""
        return self.reference.compared > 0 and all(entry.waived_by is not None for entry in self.entries)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two traces aligned and judged."""

    format_version: int = COMPARISON_VERSION
    passed: bool
    reason: str
    """One sentence: why it passed or what failed first."""
    reference: str
    candidate: str
    verdict: str
    """The rule that judged, in words."""
    plan: tuple[str, ...]
    """The plan as printed before execution."""
    ledger: Ledger
    records: LazySequence[RecordVerdict]
    """In the reference's order. Those that are identical by digest are built where they are asked for."""
    first_divergence: FirstDivergence | None = None
    token_divergences: tuple[TokenDivergence, ...] = ()
    warnings: tuple[str, ...] = ()
    waivers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given: object = self.records
        if isinstance(given, tuple):  # of one who builds a result by hand
            object.__setattr__(self, "records", LazySequence(given))

    @property
    def exit_code(self) -> int:
        """0 passed, 1 compared and failed."""
        return 0 if self.passed else 1

    @property
    def counts(self) -> dict[str, int]:
        """Number of pairs per status."""
        found = Counter(record.status for record in self.records.single)
        found["identical"] += self.records.rows
        return {status: found[status] for status in ("identical", "passed", "inconclusive", "failed", "corrupt")}

    def failing(self) -> tuple[RecordVerdict, ...]:
        """The pairs that neither passed nor were waived, in order."""
        return tuple(record for record in self.records.single if not record.passing)

    def to_frame(self) -> pl.DataFrame:
        """One row per pair: identity, status, metrics, noise ratios, fingerprints."""
        import polars as pl

        return pl.DataFrame([_flat(record) for record in self.records], infer_schema_length=None)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("tensor", "status", "rel_l2", "noise ratio", "why"))
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(record)) + "</tr>"
            for record in sorted(self.records, key=lambda one: one.passing)[:50]
        )
        text = html.escape(summarise(self))
        return f"<pre>{text}</pre><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def summarise(comparison: Comparison, *, limit: int = 10) -> str:
    """Render a comparison as text for a terminal.

    Args:
        comparison: what `compare` returned.
        limit: how many failing pairs, ledger entries and warnings are listed; what is left out is counted.
    """
    counts = ", ".join(f"{number} {status}" for status, number in comparison.counts.items() if number)
    ledger = comparison.ledger
    lines = [
        f"{'PASSED' if comparison.passed else 'FAILED'}: {comparison.reason}",
        f"reference {comparison.reference}",
        f"candidate {comparison.candidate}",
        f"verdict   {comparison.verdict}",
        f"pairs     {counts or 'none'}",
        f"ledger    {ledger.unit}; {ledger.expectation}",
        f"  reference {_count(ledger.reference)}",
        f"  candidate {_count(ledger.candidate)}",
    ]
    if comparison.first_divergence is not None:
        first = comparison.first_divergence
        lines.append(f"first divergence: {first.text}: {first.reason}")
    lines += [
        f"tokens diverge: prompt {one.prompt} request {one.request} at position {one.position} "
        f"({one.reference_id} against {one.candidate_id})"
        for one in comparison.token_divergences[:limit]
    ]
    failing = comparison.failing()
    lines += _listed("pair", [f"{one.status} {one.key.text}: {_why(one)}" for one in failing], limit)
    lines += _listed(
        "ledger entry",
        [
            f"{entry.kind} ({entry.side}) {entry.name}: {entry.reason}"
            + (f" [waived by {entry.waived_by!r}]" if entry.waived_by else "")
            for entry in ledger.entries
            if entry.kind not in ("failed", "inconclusive")
        ],
        limit,
    )
    lines += _listed("warning", [f"warning: {text}" for text in comparison.warnings], limit)
    return "\n".join(lines)


def _listed(what: str, texts: list[str], limit: int) -> list[str]:
    rest = len(texts) - limit
    more = [f"  ... {rest} more {'entries' if what == 'ledger entry' and rest > 1 else what + 's' * (rest > 1)}"]
    return [f"  {text}" for text in texts[:limit]] + (more if rest > 0 else [])


def _count(side: SideCount) -> str:
    expected = "unknown" if side.expected is None else str(side.expected)
    return (
        f"expected {expected}, found {side.found}, compared {side.compared}, "
        f"unmatched {side.unmatched}, skipped {side.skipped}, corrupt {side.corrupt}"
    )


def _why(record: RecordVerdict) -> str:
    kinds = "".join(f" [{one.kind}: {one.detail}]" for one in record.fingerprints)
    return "; ".join(record.reasons) + kinds


def _cells(record: RecordVerdict) -> tuple[str, ...]:
    rel_l2 = f"{record.metrics.rel_l2:.3g}" if record.metrics else "0"
    ratio = f"{record.calibration.median:.3g}" if record.calibration else ""
    return (record.key.text, record.status, rel_l2, ratio, _why(record))


def _flat(record: RecordVerdict) -> dict[str, Any]:
    row: dict[str, Any] = {"tensor": record.key.tensor, **asdict(record.key)}
    row |= {
        "order": record.order,
        "status": record.status,
        "passing": record.passing,
        "dtype_reference": record.dtype_reference,
        "dtype_candidate": record.dtype_candidate,
        "rows": record.rows,
        "severity": record.severity,
        "max_ulp": record.max_ulp,
        "ranks": list(record.ranks),
        "tolerance": record.tolerance.both if record.tolerance else 0.0 if record.status == "identical" else None,
        "fingerprints": [one.kind for one in record.fingerprints],
        "reasons": "; ".join(record.reasons),
    }
    identical = record.status == "identical"
    for one in fields(Metrics):
        if one.name in ("numel", "rows", "max_abs_index"):
            continue
        value = getattr(record.metrics, one.name) if record.metrics else None
        row[one.name] = 0.0 if identical and one.name in _ZERO_WHEN_IDENTICAL and value is None else value
    calibration = record.calibration
    row["expected"] = calibration.expected if calibration else None
    row["noise_ratio"] = calibration.median if calibration else 0.0 if identical else None
    row["worst_noise_ratio"] = calibration.worst if calibration else 0.0 if identical else None
    row["excess"] = calibration.excess if calibration else 0.0 if identical else None
    for name in ("max_abs_reference", "max_abs_candidate"):
        row[name] = math.nan if row[name] is None else float(row[name])
    return row


_ZERO_WHEN_IDENTICAL = ("mae", "rmse", "max_abs", "rel_l2", "rel_diff", "worst_row_error", "worst_channel_rms")
