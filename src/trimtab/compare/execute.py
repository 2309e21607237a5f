"""Carry a plan out: one pair at a time, in the reference's order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
import torch

from trimtab._base.progress import progress
from trimtab.compare._closer import blame, ranks_at, shard_errors, tolerance, worst_elements, worst_rows
from trimtab.compare._copies import verify_copies
from trimtab.compare._diverge import FirstOf
from trimtab.compare._measured import Measured, relative_rows
from trimtab.compare._parts import Notes, Outcome, Part, replay
from trimtab.compare._updates import BEHIND, MOVED, Updates
from trimtab.compare.align import Aligned
from trimtab.compare.fingerprints import Neighbour, find_fingerprints
from trimtab.compare.ledger import Book, LedgerBook
from trimtab.compare.match import Pair, key_of
from trimtab.compare.measure import measure
from trimtab.compare.plan import ComparisonPlan, noise_is_identical
from trimtab.compare.rounding import Expected, blocks_upstream, expected_error
from trimtab.compare.routing import HINT, Routing
from trimtab.compare.rules import Rule, first_match
from trimtab.compare.verdict import Judgement, judge
from trimtab.compare.waivers import waived_by
from trimtab.errors import ComparisonError, TraceCorruptError
from trimtab.numerics.dtypes import coarser, dtype_name
from trimtab.results._lazy import LazySequence
from trimtab.results.comparison import Fingerprint, Ledger, RecordKey, RecordVerdict, RowSeries, Side
from trimtab.trace import Trace

_FINGERPRINTS = 1000  # failing pairs beyond these are not searched for fingerprints


class Execution:
    """The state of one comparison while its pairs are judged."""

    def __init__(self, plan: ComparisonPlan) -> None:
        self.plan = plan
        self._ledger = LedgerBook(plan)
        self.book: Book = self._ledger
        self.first = FirstOf()
        self._traces = (plan.reference.trace, plan.candidate.trace)
        self._digests: tuple[dict[int, str | None], ...] | None = None
        self._by_key: dict[RecordKey, Pair] | None = None
        self._searched = 0
        self._noise_moved = plan.noise is None
        self._noise_used = False
        self._routing = Routing(plan)
        self._updates = Updates(plan, self._expected)
        self._idle_rules: set[Rule | None] = set(plan.rules)

    @property
    def idle_rules(self) -> tuple[Rule, ...]:
        """Rules that have judged nothing so far."""
        return tuple(rule for rule in self.plan.rules if rule in self._idle_rules)

    def ledger(self) -> Ledger:
        """What was compared and what was not."""
        return self._ledger.close()

    def records(
        self, parts: Iterable[Part] | None = None, on_record: Callable[[RecordVerdict], None] | None = None
    ) -> LazySequence[RecordVerdict]:
        """Judge every pair; what could not be compared goes to the ledger only.

        Args:
            parts: what other processes found, in order; None judges here.
            on_record: called with each verdict as soon as it is known, in order.

        Raises:
            ComparisonError: the noise runs turned out to be bit-identical.
        """
        pairs, judged = self.plan.matched.pairs, self.judged(parts)
        if self.plan.verify:
            pairs = LazySequence(pairs)
        elif pairs.table is not None:
            self._enter_identical(pairs.table)
        single: list[RecordVerdict] = []
        order: list[int] = []
        same = LazySequence[RecordVerdict](table=pairs.table, build=_identical, order=pairs.order).from_table()
        for at in pairs.order:
            record = next(judged) if at < 0 else next(same) if on_record is not None else None
            if at >= 0:
                order.append(at)
            elif record is not None:
                order.append(~len(single))
                single.append(record)
            if record is not None and on_record is not None:
                on_record(record)
        next(judged, None)  # what it has to say at its end
        return LazySequence(single, table=pairs.table, build=_identical, order=order)

    def _enter_identical(self, table: pl.DataFrame) -> None:
        """Count the pairs that equal digests have judged."""
        self._ledger.compared_rows(table)
        tensors = {key_of(row).tensor for row in table.unique(("site", "name")).iter_rows(named=True)}
        self._idle_rules -= {first_match(self.plan.rules, tensor) for tensor in tensors}

    def judged(self, parts: Iterable[Part] | None = None) -> Iterator[RecordVerdict | None]:
        """Judge what is to be judged of the plan, in order; None for what could not be compared.

        Raises:
            ComparisonError: the noise runs turned out to be bit-identical.
        """
        verify_copies((self.plan.reference, self.plan.candidate), self.book, verify=self.plan.verify)
        found = (
            map(self._record, self.plan.to_judge) if parts is None else chain.from_iterable(map(self._absorb, parts))
        )
        with progress("compare", len(self.plan.to_judge)) as bar:
            for record in found:
                bar.advance()
                yield record
        noise = self.plan.noise
        if noise is not None and self._noise_used and not self._noise_moved:
            raise noise_is_identical(noise.reference.path, noise.candidate.path)

    def part(self, begin: int, end: int) -> Part:
        """Judge the pairs `[begin, end)` for another process, which enters them into its ledger."""
        notes = Notes()
        self.book, self.first, self._searched = notes, FirstOf(), 0
        self._idle_rules, self._noise_used, self._noise_moved = set(self.plan.rules), False, self.plan.noise is None
        outcomes = []
        for number in range(begin, end):
            searched = self._searched
            record = self._record(self.plan.to_judge[number])
            outcomes.append(Outcome(number, record, notes.take(), self._searched > searched))
        used = frozenset(number for number, rule in enumerate(self.plan.rules) if rule not in self._idle_rules)
        return Part(tuple(outcomes), self.first, used, self._noise_used, self._noise_moved)

    def _absorb(self, part: Part) -> Iterator[RecordVerdict | None]:
        """Enter what another process found, as if it had been found here."""
        for number, record, notes, searched in part.outcomes:
            replay(notes, self.book, self.plan.to_judge[number])
            self._searched += searched
            if record is not None and searched and self._searched > _FINGERPRINTS:
                record = _unsearched(record)
            yield record
        self.first.merge(part.first)
        self._idle_rules -= {self.plan.rules[number] for number in part.rules}
        self._noise_used |= part.noise_used
        self._noise_moved |= part.noise_moved

    def _record(self, pair: Pair) -> RecordVerdict | None:
        try:
            damaged = self._verify(pair) if self.plan.verify else None
            if damaged is not None:
                return self._corrupt(pair, *damaged)
            if pair.same_digest:
                self._idle_rules.discard(self.plan.rule_for(pair.key))
                return self._done(pair, RecordVerdict(key=pair.key, status="identical", order=pair.order))
            if not pair.stored:
                reason = "its values were not kept, and the digests differ or are missing"
                self.book.short("both", "skipped", pair, reason)
                return None
            return self._compare(pair)
        except TraceCorruptError as error:
            return self._corrupt(pair, "both", str(error))
        except ComparisonError as error:  # the layouts of the two sides do not fit
            self.book.short("both", "skipped", pair, str(error))
            return None

    def _compare(self, pair: Pair) -> RecordVerdict:
        aligned = Aligned(pair, *self._traces)
        known: dict[str, Any] = {
            "key": pair.key,
            "order": pair.order,
            "dtype_reference": dtype_name(aligned.dtypes[0]),
            "dtype_candidate": dtype_name(aligned.dtypes[1]),
            "shape_reference": aligned.shapes[0],
            "shape_candidate": aligned.shapes[1],
            "rows": len(pair.positions) if pair.positions is not None else 0,
        }
        self._note_tokens(pair, aligned)
        if not aligned.fits:
            reason = f"shapes differ: {list(aligned.shapes[0])} against {list(aligned.shapes[1])}"
            record = RecordVerdict(status="failed", reasons=(reason,), **known)
            self.first.note(pair, record, None, None)
            return self._done(pair, record)
        measured = measure(aligned.fused(), aligned.shape, aligned.dtypes)
        expected, rule = self._expected(pair, aligned), self.plan.rule_for(pair.key)
        judged = judge(self.plan.verdict, measured, expected, aligned, rule=rule, layer=pair.key.layer)
        if not measured.exact:
            self._idle_rules.discard(rule)
        warnings = measured.warnings
        if judged.status in ("failed", "inconclusive"):
            eased = self._updates.ease(pair, aligned, measured, expected)
            if eased is not None:
                judged = eased
                warnings += (MOVED if pair.key.kind == "param" else BEHIND,) if eased.status == "passed" else ()
        record = RecordVerdict(
            status=judged.status,
            reasons=judged.reasons,
            metrics=measured.metrics,
            coarse=measured.coarse,
            coarse_dtype=dtype_name(coarser(*aligned.dtypes)) if measured.coarse is not None else None,
            calibration=judged.calibration,
            severity=judged.severity,
            warnings=warnings,
            series=_series(pair, measured) if self.plan.keep_rows else None,
            tolerance=tolerance(aligned) if self.plan.tolerances and aligned.comparable else None,
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
        found = self._fingerprints(pair, aligned, measured, expected, judged) if aligned.comparable else ()
        routed = self._routing.explain(pair, measured, expected, judged.calibration) if floats else None
        suspected = routed is None and self._routing.suspected(pair, found)
        reasons = (routed.detail, *record.reasons) if routed is not None and routed.explained == 1 else record.reasons
        record = dataclasses.replace(
            record,
            max_ulp=aligned.max_ulp() if floats else None,
            quantiles=aligned.quantiles() if floats else (),
            fingerprints=(routed, *found) if routed is not None else found,
            reasons=reasons,
            warnings=(*record.warnings, HINT) if suspected else record.warnings,
        )
        record = self._waive(self._look_closer(aligned, record, measured))
        self.first.note(pair, record, aligned, measured)
        return record

    def _look_closer(self, aligned: Aligned, record: RecordVerdict, measured: Measured) -> RecordVerdict:
        """Add the tolerance that would be needed, the worst elements and rows, and who held them."""
        if not aligned.comparable:
            return record
        shards = shard_errors(aligned)
        said = blame(shards)
        flat = measured.worst_flat if measured.first_flat is None else measured.first_flat
        return dataclasses.replace(
            record,
            ranks=ranks_at(aligned, flat) if aligned.rows * aligned.width else (),
            shards=shards,
            reasons=record.reasons if said is None else (*record.reasons, said),
            tolerance=record.tolerance or tolerance(aligned),
            worst_elements=worst_elements(aligned, self.plan.worst) if self.plan.worst else (),
            worst_rows=worst_rows(aligned, measured, self.plan.worst) if self.plan.worst else (),
        )

    def _note_tokens(self, pair: Pair, aligned: Aligned) -> None:
        """Enter tokens that only one side has, once for each forward pass."""
        if aligned.views is None or aligned.views.tokens is None:
            return
        tokens = aligned.views.tokens
        sides: tuple[Side, Side] = (
            ("reference", "candidate") if aligned.views.packed_first else ("candidate", "reference")
        )
        key = RecordKey(name="tokens", phase=pair.key.phase, step=pair.key.step, micro_step=pair.key.micro_step)
        for side, alone in zip(sides, (tokens.alone_packed, tokens.alone_padded), strict=True):
            if alone:
                more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
                reason = f"the other side has no such tokens: {', '.join(alone[:3])}{more}"
                self.book.note(side, "unmatched", key, len(alone), reason)

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
            whole = found is not None and found.stored and found.layouts is None
            return self._traces[0].tensor(found.reference_ids[0]) if found is not None and whole else None

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
        found = noise.pairs.get(pair.key) or noise.pairs.get(dataclasses.replace(pair.key, rank=None))
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
        self.book.short(side, "corrupt", pair, reason)
        record = RecordVerdict(key=pair.key, status="corrupt", order=pair.order, reasons=(f"{side}: {reason}",))
        self.first.note(pair, record, None, None)
        return record

    def _done(self, pair: Pair, record: RecordVerdict) -> RecordVerdict:
        self.book.compared(pair)
        return self._waive(record)

    def _waive(self, record: RecordVerdict) -> RecordVerdict:
        if record.waived_by is not None or record.status not in ("failed", "inconclusive"):
            return record
        waiver = waived_by(self.plan.waive, record.status, record.key.text, record.key.tensor)
        return dataclasses.replace(record, waived_by=waiver) if waiver is not None else record


def _identical(row: Mapping[str, Any]) -> RecordVerdict:
    """The verdict on two whole records of equal digest, a row of the table of pairs."""
    return RecordVerdict(key=key_of(row), status="identical", order=row["order"])


def _unsearched(record: RecordVerdict) -> RecordVerdict:
    """The record as it is when fingerprints are no longer searched for."""
    routed = tuple(one for one in record.fingerprints if one.kind == "routing")
    warnings = tuple(text for text in record.warnings if text != HINT)
    return dataclasses.replace(record, fingerprints=routed, warnings=warnings)


def _noise_error(pair: Pair, reference: Trace, candidate: Trace) -> float:
    """Median relative row error between two noise runs, of the rows that differ at all."""
    aligned = Aligned(pair, reference, candidate)
    if not (aligned.fits and aligned.comparable):
        return 0.0
    measured = measure(aligned.fused(), aligned.shape, aligned.dtypes)
    relative = relative_rows(measured.row_error, measured.row_norm)
    moved = relative[relative > 0]
    return float(np.median(moved)) if moved.size else 0.0


def _series(pair: Pair, measured: Measured) -> RowSeries:
    relative = relative_rows(measured.row_error, measured.row_norm)
    positions = range(len(relative)) if pair.positions is None else pair.positions.tolist()
    return RowSeries(positions=tuple(positions), error=tuple(relative.tolist()), norm=tuple(measured.row_norm.tolist()))
