"""The ledger: every item of both sides is compared, unmatched, skipped or corrupt, and nothing is forgotten."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal, Protocol

import polars as pl

from trimtab.compare._short import Short
from trimtab.compare.match import Pair
from trimtab.compare.plan import ComparisonPlan
from trimtab.compare.waivers import waived_by
from trimtab.results.comparison import (
    EntryKind,
    Ledger,
    LedgerEntry,
    LedgerGroup,
    RecordKey,
    Side,
    SideCount,
)

Axis = Literal["step", "rank", "site"]
AXES: tuple[Axis, ...] = ("step", "rank", "site")
_SIDES: tuple[Literal["reference", "candidate"], ...] = ("reference", "candidate")
_COUNTED = ("compared", "unmatched", "skipped", "corrupt")


class Book(Protocol):
    """Where what became of a pair is entered."""

    def compared(self, pair: Pair) -> None:
        """A pair was compared."""

    def short(self, side: Side, kind: EntryKind, pair: Pair, reason: str) -> None:
        """A pair could not be compared after all."""

    def note(self, side: Side, kind: EntryKind, key: RecordKey, count: int, reason: str) -> None:
        """Something that counts no record."""


class LedgerBook:
    """Counts items while a plan is executed."""

    def __init__(self, plan: ComparisonPlan) -> None:
        self._plan = plan
        self._counts: dict[tuple[str, Axis | None, str], Counter[str]] = defaultdict(Counter)
        self._entries: list[LedgerEntry] = []
        self._noted: set[tuple[str, str, RecordKey]] = set()
        self._add_short(plan.matched.short)
        for met in plan.met:
            if met is not None:
                self._entries += [self._entry(one, one.count) for one in met.missing]
        for side in (plan.reference, plan.candidate):
            for problem in side.problems:
                entry = LedgerEntry(side=_side(side.label), kind="incomplete", name=side.path, count=1, reason=problem)
                self._entries.append(self._waive(entry))

    def compared(self, pair: Pair) -> None:
        """Count a pair that was compared."""
        for at, side in enumerate(_SIDES):
            self._count(side, pair.key, "compared", pair.items[at], pair.ranks[at])

    def compared_rows(self, table: pl.DataFrame) -> None:
        """Count whole records of one pair each, given by their identities (`match.key_of`)."""
        tensor = pl.when(pl.col("site") == "").then("name").otherwise("site")
        by_step = table.filter(pl.col("prompt").is_null() | pl.col("rank").is_not_null())
        by_rank = table.filter(pl.col("rank").is_not_null())
        groups: tuple[tuple[Axis | None, pl.DataFrame, pl.Expr], ...] = (
            (None, table, pl.lit("")),
            ("site", table, tensor),
            ("step", by_step, pl.col("step")),
            ("rank", by_rank, pl.col("rank")),
        )
        for axis, rows, value in groups:
            for name, count in rows.group_by(value.alias("value"), maintain_order=True).len().iter_rows():
                for side in _SIDES:
                    self._counts[side, axis, str(name)]["compared"] += count

    def short(self, side: Side, kind: EntryKind, pair: Pair, reason: str) -> None:
        """Count a pair that could not be compared after all."""
        counted = _SIDES if side == "both" else (side,)
        for at, one in enumerate(_SIDES):
            self._count(one, pair.key, kind if one in counted else "skipped", pair.items[at], pair.ranks[at])
        count = max(pair.items[at] for at, one in enumerate(_SIDES) if one in counted)
        self.note(side, kind, pair.key, count, reason)

    def note(self, side: Side, kind: EntryKind, key: RecordKey, count: int, reason: str) -> None:
        """Enter something that counts no record: a copy that differs, a token without a partner."""
        entry = self._waive(LedgerEntry(side=side, kind=kind, name=key.text, count=count, reason=reason), key.tensor)
        if (side, kind, key) not in self._noted or kind != "unmatched":  # tokens alone are met at every tensor
            self._entries.append(entry)
        self._noted.add((side, kind, key))

    def close(self) -> Ledger:
        """The ledger as a result."""
        sides = (self._plan.reference, self._plan.candidate)
        kinds = {bool(one) for side in sides for one in side.units["by_row"].unique()}
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
        grouped: dict[tuple[str, str, str], list[Short]] = defaultdict(list)
        for one in short:
            if one.kind != "missing":
                self._count(one.side, one.key, one.kind, one.count)
            if one.group and not waived_by(self._plan.waive, one.kind, one.key.text, one.key.tensor):
                grouped[one.side, one.kind, one.group].append(one)
            else:
                self._entries.append(self._entry(one, one.count))
        for (side, _, group), members in grouped.items():
            count = sum(one.count for one in members)
            unit = "records" if members[0].key.prompt is None else "rows"
            such = f", such as {members[0].key.text}" if unit == "records" else ""
            tensors = len({one.key.tensor for one in members})
            many = f"{tensors} tensor{'s' * (tensors > 1)}" if unit == "records" else f"{len(members)} tensors"
            reason = f"{members[0].reason} ({count} {unit} of {many}{such})"
            kind = _kind(members[0].kind)
            entry = LedgerEntry(side=_side(side), kind=kind, name=group, count=count, reason=reason)
            self._entries.append(self._waive(entry, *(one.key.text for one in members[:1])))

    def _entry(self, one: Short, count: int) -> LedgerEntry:
        kind = _kind(one.kind)
        excuse = one.excuse or None
        entry = LedgerEntry(
            side=_side(one.side), kind=kind, name=one.key.text, count=count, reason=one.reason, waived_by=excuse
        )
        return entry if excuse else self._waive(entry, one.key.tensor)

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

    def _count(self, side: str, key: RecordKey, kind: str, items: int, ranks: tuple[int, ...] = ()) -> None:
        places: list[tuple[Axis | None, str]] = [(None, ""), ("site", key.tensor)]
        if key.prompt is None or key.rank is not None:
            places.append(("step", str(key.step)))
        places += [("rank", str(key.rank))] if key.rank is not None else []
        for axis, value in places:
            self._counts[side, axis, value][kind] += items
        for rank in ranks if key.rank is None else ():
            self._counts[side, "rank", str(rank)][kind] += max(items // len(ranks), 1)

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
