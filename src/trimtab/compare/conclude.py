"""Run a plan, here or in several processes, and say what it comes to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from trimtab.compare.execute import Execution
from trimtab.compare.parallel import judge_in_processes
from trimtab.compare.plan import ComparisonPlan
from trimtab.compare.routing import ROUTED
from trimtab.errors import InputError
from trimtab.results._lazy import LazySequence
from trimtab.results.comparison import Comparison, FirstDivergence, Ledger, LedgerEntry, RecordVerdict
from trimtab.results.lines import ComparedLine, VerdictLine

Tell = Callable[[ComparedLine | VerdictLine], None]


def run(plan: ComparisonPlan, *, jobs: int = 1, on_compared: Tell | None = None) -> Comparison:
    """Execute a plan.

    Args:
        plan: what to compare with what.
        jobs: processes; what they find does not depend on their number.
        on_compared: called with each pair as soon as it is judged, in order, and with the verdict last.

    Raises:
        InputError: no process.
        ComparisonError: the noise runs turned out to be bit-identical.
    """
    if jobs < 1:
        raise InputError(f"jobs={jobs}: a number of processes, at least 1")
    execution = Execution(plan)
    on_record = None if on_compared is None else partial(_tell, plan, on_compared)
    records = execution.records(judge_in_processes(plan, jobs) if jobs > 1 else None, on_record)
    comparison = conclude(execution, records)
    if on_compared is not None:
        told = (comparison.passed, comparison.reason, comparison.ledger)
        on_compared(VerdictLine(of="comparison", passed=told[0], reason=told[1], ledger=told[2]))
    return comparison


def _tell(plan: ComparisonPlan, on_compared: Tell, record: RecordVerdict) -> None:
    on_compared(ComparedLine(reference=plan.reference.path, candidate=plan.candidate.path, record=record))


def conclude(execution: Execution, records: LazySequence[RecordVerdict]) -> Comparison:
    """Return what the verdicts of a plan that was executed come to."""
    plan, first, ledger = execution.plan, execution.first.found, execution.ledger()
    clean = all(one.passing for one in records.single) and all(one.waived_by is not None for one in ledger.entries)
    return Comparison(
        passed=bool(ledger.reference.compared) and clean,
        reason=_reason(records, ledger, first),
        reference=plan.reference.path,
        candidate=plan.candidate.path,
        verdict=str(plan.verdict),
        plan=plan.lines(),
        ledger=ledger,
        records=records,
        first_divergence=first,
        token_divergences=plan.matched.tokens,
        warnings=tuple(_warnings(execution, records, ledger)),
        waivers=plan.waive,
    )


def _reason(records: LazySequence[RecordVerdict], ledger: Ledger, first: FirstDivergence | None) -> str:
    failing = [record for record in records.single if not record.passing]
    short = [entry for entry in ledger.entries if entry.waived_by is None]
    if not ledger.reference.compared:
        return "nothing was compared" + (f": {_entry(short[0])}" if short else "")
    if failing:
        where = first.text if first is not None else failing[0].key.text
        routed = all(record.reasons and record.reasons[0].startswith(ROUTED) for record in failing)
        return f"{ROUTED * routed}{len(failing)} of {len(records)} pairs do not pass; first: {where}"
    if short:
        more = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
        return f"incomplete: {_entry(short[0])}{more}"
    return f"all {len(records)} pairs pass ({ledger.reference.compared} {ledger.unit} compared)"


def _entry(entry: LedgerEntry) -> str:
    where = "both" if entry.side == "both" else f"the {entry.side}"
    return f"{entry.kind} in {where}: {entry.name}: {entry.reason}"


def _warnings(execution: Execution, records: LazySequence[RecordVerdict], ledger: Ledger) -> list[str]:
    plan = execution.plan
    warnings = list(plan.matched.warnings)
    said: dict[str, list[str]] = {}
    for record in records.single:
        for text in record.warnings:
            said.setdefault(text, []).append(record.key.text)
    warnings += [
        f"{text}: {names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1) for text, names in said.items()
    ]
    used = {one.waived_by for one in records.single} | {entry.waived_by for entry in ledger.entries}
    warnings += [f"the waiver {one!r} excused nothing" for one in plan.waive if one not in used]
    warnings += [
        f"the rule {one.pattern!r} judged nothing: what it matches has no pair of floating tensors"
        for one in execution.idle_rules
    ]
    if ledger.reference.expected is None or ledger.candidate.expected is None:
        warnings.append("no plan says what must be there: what both sides lack is not noticed (give expect=FILE)")
    return warnings
