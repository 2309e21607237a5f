"""Carry a plan out: one pair at a time, in the reference's order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trimtab.compare._diverge import FirstOf
from trimtab.compare._measured import Measured, relative_rows
from trimtab.compare.align import Aligned
from trimtab.compare.fingerprints import Neighbour, find_fingerprints
from trimtab.compare.ledger import LedgerBook, waived_by
from trimtab.compare.match import Pair
from trimtab.compare.measure import measure
from trimtab.compare.plan import ComparisonPlan, noise_is_identical
from trimtab.compare.rounding import Expected, blocks_upstream, expected_error
from trimtab.compare.verdict import Judgement, judge
from trimtab.errors import TraceCorruptError
from trimtab.numerics.dtypes import coarser, dtype_name
from trimtab.results.comparison import Comparison, Fingerprint, RecordKey, RecordVerdict, RowSeries, Side
from trimtab.trace import Trace

_FINGERPRINTS = 1000  # failing pairs beyond these are not searched for fingerprints


class Execution:
    """The state of one comparison while its pairs are judged."""

    def __init__(self, plan: ComparisonPlan) -> None:
        self.plan = plan
        self.book = LedgerBook(plan)
        self.first = FirstOf()
        self._traces = (plan.reference.trace, plan.candidate.trace)
        self._digests: tuple[dict[int, str | None], ...] | None = None
        self._by_key: dict[RecordKey, Pair] | None = None
        self._searched = 0
        self._noise_moved = plan.noise is None
        self._noise_used = False

    def records(self) -> Iterator[RecordVerdict]:
        """Judge every pair; what could not be compared goes to the ledger only.

        Raises:
            ComparisonError: the noise runs turned out to be bit-identical.
        """
        for pair in self.plan.matched.pairs:
            record = self._record(pair)
            if record is not None:
                yield record
        noise = self.plan.noise
        if noise is not None and self._noise_used and not self._noise_moved:
            raise noise_is_identical(noise.reference.path, noise.candidate.path)

    def _record(self, pair: Pair) -> RecordVerdict | None:
        try:
            damaged = self._verify(pair) if self.plan.verify else None
            if damaged is not None:
                return self._corrupt(pair, *damaged)
            if pair.same_digest:
                return self._done(pair, RecordVerdict(key=pair.key, status="identical", order=pair.order))
            if not pair.stored:
                reason = "its values were not kept, and the digests differ or are missing"
                self.book.short("both", "skipped", pair.key, pair.items, reason)
                return None
            return self._compare(pair)
        except TraceCorruptError as error:
            return self._corrupt(pair, "both", str(error))

    def _compare(self, pair: Pair) -> RecordVerdict:
        aligned = Aligned(pair, *self._traces)
        known: dict[str, Any] = {
            "key": pair.key,
            "order": pair.order,
            "dtype_reference": dtype_name(aligned.dtypes[0]),
            "dtype_candidate": dtype_name(aligned.dtypes[1]),
            "shape_reference": aligned.shapes[0],
            "shape_candidate": aligned.shapes[1],
            "rows": pair.items if pair.positions is not None else 0,
        }
        if not aligned.fits:
            reason = f"shapes differ: {list(aligned.shapes[0])} against {list(aligned.shapes[1])}"
            record = RecordVerdict(status="failed", reasons=(reason,), **known)
            self.first.note(pair, record, None, None)
            return self._done(pair, record)
        measured = measure(aligned.chunks(), aligned.shape, aligned.dtypes)
        expected = self._expected(pair, aligned)
        judged = judge(
            self.plan.verdict,
            measured,
            expected,
            aligned,
            rule=self.plan.rule_for(pair.key),
            layer=pair.key.layer,
        )
        record = RecordVerdict(
            status=judged.status,
            reasons=judged.reasons,
            metrics=measured.metrics,
            coarse=measured.coarse,
            coarse_dtype=dtype_name(coarser(*aligned.dtypes)) if measured.coarse is not None else None,
            calibration=judged.calibration,
            severity=judged.severity,
            warnings=measured.warnings,
            series=_series(pair, measured) if self.plan.keep_rows else None,
            **known,
        )
        if judged.status in ("failed", "inconclusive"):
            record = self._investigate(pair, aligned, record, measured, expected, judged)
        return self._done(pair, record)

    def _investigate(
        self,
        pair: Pair,
        aligned: Aligned,
        record: RecordVerdict,
        measured: Measured,
        expected: Expected,
        judged: Judgement,
    ) -> RecordVerdict:
        """Add what is only measured on pairs that did not pass: ULP, quantiles, fingerprints, the first bad row."""
        floats = aligned.comparable and not measured.exact
        self._searched += 1
        record = dataclasses.replace(
            record,
            max_ulp=aligned.max_ulp() if floats else None,
            quantiles=aligned.quantiles() if floats else (),
            fingerprints=self._fingerprints(pair, aligned, measured, expected, judged) if aligned.comparable else (),
        )
        record = self._waive(record)
        self.first.note(pair, record, aligned, measured)
        return record

    def _fingerprints(
        self, pair: Pair, aligned: Aligned, measured: Measured, expected: Expected, judged: Judgement
    ) -> tuple[Fingerprint, ...]:
        if self._searched > _FINGERPRINTS:
            return ()
        row = measured.metrics.worst_row
        window = aligned.window(row)
        whole = window.reference.shape[0] == aligned.rows
        shape = aligned.shape if whole else (window.reference.shape[0], aligned.width)
        tolerance = 4 * expected.error
        if judged.calibration is None or judged.calibration.systematic:  # a small but certain error is explained too
            tolerance = min(tolerance, 0.7 * measured.metrics.rel_l2)
        return find_fingerprints(
            window.reference.reshape(shape),
            window.candidate.reshape(shape),
            tolerance=tolerance,
            whole=whole,
            neighbour=self._neighbour(pair) if whole else None,
        )

    def _neighbour(self, pair: Pair) -> Neighbour | None:
        """The reference's tensor of another step."""
        if pair.positions is not None:
            return None
        if self._by_key is None:
            self._by_key = {one.key: one for one in self.plan.matched.pairs}
        by_key = self._by_key

        def other(distance: int) -> torch.Tensor | None:
            found = by_key.get(dataclasses.replace(pair.key, step=pair.key.step + distance))
            return self._traces[0].tensor(found.reference_ids[0]) if found is not None and found.stored else None

        return other

    def _expected(self, pair: Pair, aligned: Aligned) -> Expected:
        """The expected error from the noise runs, or from the rounding model."""
        dtype = coarser(*aligned.dtypes)
        if aligned.comparable and dtype.is_floating_point and self.plan.compute_dtype is not None:
            dtype = coarser(dtype, self.plan.compute_dtype)
        if not (dtype.is_floating_point or dtype.is_complex):
            return Expected(error=0.0, source="exact", dtype=dtype_name(dtype), blocks=0)
        blocks = blocks_upstream(pair.key, self.plan.num_layers)
        model = expected_error(dtype, blocks=blocks, width=aligned.width, kind=pair.key.kind)
        noise = self.plan.noise
        if noise is None:
            return model
        found = noise.pairs.get(pair.key)
        if found is None or not (found.stored or found.same_digest):
            return dataclasses.replace(model, source=f"{model.source}; not in the noise runs")
        self._noise_used = True
        error = 0.0 if found.same_digest else _noise_error(found, noise.reference.trace, noise.candidate.trace)
        self._noise_moved |= error > 0
        return dataclasses.replace(model, error=error, common=error, underflow=0.0, source="noise run")

    def _verify(self, pair: Pair) -> tuple[Side, str] | None:
        """Hash the stored bytes again; return the side and the reason when they are not what was written."""
        if self._digests is None:
            self._digests = tuple(
                dict(zip(trace.index["record_id"], trace.index["digest"], strict=True)) for trace in self._traces
            )
        sides: tuple[tuple[Side, tuple[int, ...]], ...] = (
            ("reference", pair.reference_ids),
            ("candidate", pair.candidate_ids),
        )
        for number, (side, ids) in enumerate(sides):
            for record_id in ids if pair.stored else ():
                written = self._digests[number][record_id]
                try:
                    found = self._traces[number].rehash(record_id)
                except TraceCorruptError as error:
                    return side, str(error)
                if written is not None and found != written:
                    return side, f"record {record_id}: its bytes hash to {found}, {written} was written"
        return None

    def _corrupt(self, pair: Pair, side: Side, reason: str) -> RecordVerdict:
        self.book.short(side, "corrupt", pair.key, pair.items, reason)
        record = RecordVerdict(key=pair.key, status="corrupt", order=pair.order, reasons=(f"{side}: {reason}",))
        self.first.note(pair, record, None, None)
        return record

    def _done(self, pair: Pair, record: RecordVerdict) -> RecordVerdict:
        self.book.compared(record, pair.items)
        return self._waive(record)

    def _waive(self, record: RecordVerdict) -> RecordVerdict:
        if record.waived_by is not None or record.status not in ("failed", "inconclusive"):
            return record
        waiver = waived_by(self.plan.waive, record.status, record.key.text, record.key.tensor)
        return dataclasses.replace(record, waived_by=waiver) if waiver is not None else record


def run(plan: ComparisonPlan) -> Comparison:
    """Execute a plan."""
    execution = Execution(plan)
    records = tuple(execution.records())
    ledger = execution.book.close()
    first = execution.first.found
    failing = [record for record in records if not record.passing]
    short = [entry for entry in ledger.entries if entry.waived_by is None]
    warnings = list(plan.matched.warnings)
    said: dict[str, list[str]] = {}
    for record in records:
        for text in record.warnings:
            said.setdefault(text, []).append(record.key.text)
    warnings += [
        f"{text}: {names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1) for text, names in said.items()
    ]
    warnings += [f"the waiver {one!r} excused nothing" for one in _unused(plan, records, ledger.entries)]
    if ledger.reference.expected is None or ledger.candidate.expected is None:
        warnings.append("no plan says what must be there: what both sides lack is not noticed (give expect=FILE)")
    if not ledger.reference.compared:
        reason = "nothing was compared" + (f": {short[0].name}: {short[0].reason}" if short else "")
    elif failing:
        where = first.text if first is not None else failing[0].key.text
        reason = f"{len(failing)} of {len(records)} pairs do not pass; first: {where}"
    elif short:
        entry = short[0]
        more = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
        reason = f"incomplete: {entry.kind} in the {entry.side}: {entry.name}: {entry.reason}{more}"
    else:
        reason = f"all {len(records)} pairs pass ({ledger.reference.compared} {ledger.unit} compared)"
    return Comparison(
        passed=bool(ledger.reference.compared) and not failing and not short,
        reason=reason,
        reference=plan.reference.path,
        candidate=plan.candidate.path,
        verdict=str(plan.verdict),
        plan=plan.lines(),
        ledger=ledger,
        records=records,
        first_divergence=first,
        token_divergences=plan.matched.tokens,
        warnings=tuple(warnings),
        waivers=plan.waive,
    )


def _unused(plan: ComparisonPlan, records: tuple[RecordVerdict, ...], entries: tuple[object, ...]) -> list[str]:
    used = {getattr(one, "waived_by", None) for one in (*records, *entries)}
    return [waiver for waiver in plan.waive if waiver not in used]


def _noise_error(pair: Pair, reference: Trace, candidate: Trace) -> float:
    """Median relative row error between two noise runs, of the rows that differ at all."""
    aligned = Aligned(pair, reference, candidate)
    if not (aligned.fits and aligned.comparable):
        return 0.0
    measured = measure(aligned.chunks(), aligned.shape, aligned.dtypes)
    relative = relative_rows(measured.row_error, measured.row_norm)
    moved = relative[relative > 0]
    return float(np.median(moved)) if moved.size else 0.0


def _series(pair: Pair, measured: Measured) -> RowSeries:
    relative = relative_rows(measured.row_error, measured.row_norm)
    positions = range(len(relative)) if pair.positions is None else pair.positions.tolist()
    return RowSeries(positions=tuple(positions), error=tuple(relative.tolist()), norm=tuple(measured.row_norm.tolist()))
