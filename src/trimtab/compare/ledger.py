"""The ledger: every item of both sides is compared, unmatched, skipped or corrupt, and nothing is forgotten."""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from trimtab.compare.match import Short
from trimtab.compare.plan import ComparisonPlan
from trimtab.results.comparison import (
    EntryKind,
    Ledger,
    LedgerEntry,
    LedgerGroup,
    RecordKey,
    RecordVerdict,
    Side,
    SideCount,
)

Axis = Literal["step", "rank", "site"]
AXES: tuple[Axis, ...] = ("step", "rank", "site")
_SIDES: tuple[Literal["reference", "candidate"], ...] = ("reference", "candidate")
_COUNTED = ("compared", "unmatched", "skipped", "corrupt")


def waived_by(waivers: Sequence[str], kind: str, *names: str) -> str | None:
    """Return the waiver that excuses an entry.

    A waiver is a glob on the entry's name or tensor, alone or as `kind:name`; a bare kind waives all of it. `failed`
    is waived with its kind only, and `corrupt` never.
    """
    if kind == "corrupt":
        return None
    for waiver in waivers:
        patterns = (waiver,) if kind != "failed" else ()
        head, colon, tail = waiver.partition(":")
        if head == kind:
            patterns = (*patterns, tail if colon else "*")
        if any(fnmatch.fnmatchcase(name, pattern) or name == pattern for name in names for pattern in patterns):
            return waiver
    return None


class LedgerBook:
    """Counts items while a plan is executed."""

    def __init__(self, plan: ComparisonPlan) -> None:
        self._plan = plan
        self._counts: dict[tuple[str, Axis | None, str], Counter[str]] = defaultdict(Counter)
        self._entries: list[LedgerEntry] = []
        self._add_short(plan.matched.short)
        for met in plan.met:
            if met is not None:
                self._entries += [self._entry(one, one.count) for one in met.missing]
        for side in (plan.reference, plan.candidate):
            for problem in side.problems:
                entry = LedgerEntry(side=_side(side.label), kind="incomplete", name=side.path, count=1, reason=problem)
                self._entries.append(self._waive(entry))

    def compared(self, record: RecordVerdict, items: int) -> None:
        """Count a pair that was compared."""
        for side in _SIDES:
            self._count(side, record.key, "compared", items)

    def short(self, side: Side, kind: EntryKind, key: RecordKey, items: int, reason: str) -> None:
        """Count a pair that could not be compared after all."""
        counted = _SIDES if side == "both" else (side,)
        for one in _SIDES:
            self._count(one, key, kind if one in counted else "skipped", items)
        entry = LedgerEntry(side=side, kind=kind, name=key.text, count=items, reason=reason)
        self._entries.append(self._waive(entry, key.tensor))

    def close(self) -> Ledger:
        """The ledger as a result."""
        pairs = self._plan.matched.pairs
        kinds = {pair.positions is not None for pair in pairs} | {
            bool(one) for side in (self._plan.reference, self._plan.candidate) for one in side.units["by_row"].unique()
        }
        sources = dict.fromkeys(one.source for one in self._plan.expectations if one is not None)
        groups = sorted({(axis, value) for _, axis, value in self._counts if axis is not None}, key=_group_order)
        return Ledger(
            unit="rows and records" if len(kinds) == 2 else "rows" if kinds == {True} else "records",
            expectation="expected from " + " and ".join(sources) if sources else "nobody said what to expect",
            reference=self._side_count("reference", None, "", self._expected(0)),
            candidate=self._side_count("candidate", None, "", self._expected(1)),
            groups=tuple(
                LedgerGroup(
                    axis=axis,
                    value=value,
                    reference=self._side_count("reference", axis, value, None),
                    candidate=self._side_count("candidate", axis, value, None),
                )
                for axis, value in groups
            ),
            entries=tuple(self._entries),
        )

    def _expected(self, side: int) -> int | None:
        met = self._plan.met[side]
        return None if met is None else met.expected

    def _add_short(self, short: Iterable[Short]) -> None:
        grouped: dict[tuple[str, str], list[Short]] = defaultdict(list)
        for one in short:
            self._count(one.side, one.key, one.kind, one.count)
            if one.group:
                grouped[one.side, one.group].append(one)
            else:
                self._entries.append(self._entry(one, one.count))
        for (side, group), members in grouped.items():
            count = sum(one.count for one in members)
            reason = f"{members[0].reason} ({count} rows of {len(members)} tensors)"
            kind = _kind(members[0].kind)
            entry = LedgerEntry(side=_side(side), kind=kind, name=group, count=count, reason=reason)
            self._entries.append(self._waive(entry, *(one.key.text for one in members[:1])))

    def _entry(self, one: Short, count: int) -> LedgerEntry:
        kind = _kind(one.kind)
        entry = LedgerEntry(side=_side(one.side), kind=kind, name=one.key.text, count=count, reason=one.reason)
        return self._waive(entry, one.key.tensor)

    def _waive(self, entry: LedgerEntry, *names: str) -> LedgerEntry:
        waiver = waived_by(self._plan.waive, entry.kind, entry.name, *names)
        if waiver is None:
            return entry
        return LedgerEntry(
            side=entry.side,
            kind=entry.kind,
            name=entry.name,
            count=entry.count,
            reason=entry.reason,
            waived_by=waiver,
        )

    def _count(self, side: str, key: RecordKey, kind: str, items: int) -> None:
        places: list[tuple[Axis | None, str]] = [(None, ""), ("site", key.tensor)]
        if key.prompt is None or key.rank is not None:
            places += [("step", str(key.step)), ("rank", str(key.rank))]
        for axis, value in places:
            self._counts[side, axis, value][kind] += items

    def _side_count(self, side: str, axis: Axis | None, value: str, expected: int | None) -> SideCount:
        counts = self._counts[side, axis, value]
        numbers = {kind: counts[kind] for kind in _COUNTED}
        return SideCount(expected=expected, found=sum(numbers.values()), **numbers)


def _group_order(group: tuple[Axis, str]) -> tuple[int, float, str]:
    axis, value = group
    return (AXES.index(axis), float(value) if value.isdigit() else 0.0, value)


def _side(label: str) -> Side:
    assert label in ("reference", "candidate")
    return label  # type: ignore[return-value]


def _kind(text: str) -> EntryKind:
    assert text in ("missing", "unmatched", "skipped")
    return text  # type: ignore[return-value]
