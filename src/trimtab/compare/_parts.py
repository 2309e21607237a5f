"""What one process judged for another: verdicts, what it would have entered into the ledger, the first divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from trimtab.compare._diverge import FirstOf
from trimtab.compare.ledger import Book
from trimtab.compare.match import Pair
from trimtab.results.comparison import EntryKind, RecordKey, RecordVerdict, Side


class Note(NamedTuple):
    """One entry for the ledger; without a kind, the pair was compared."""

    side: Side = "both"
    kind: EntryKind | None = None
    reason: str = ""
    key: RecordKey | None = None
    """None: the entry is about the pair itself."""
    size: int = 0


class Notes:
    """Takes the place of the ledger in a process that does not hold it."""

    def __init__(self) -> None:
        self._notes: list[Note] = []

    def compared(self, pair: Pair) -> None:
        """Note that a pair was compared."""
        self._notes.append(Note())

    def short(self, side: Side, kind: EntryKind, pair: Pair, reason: str) -> None:
        """Note that a pair could not be compared."""
        self._notes.append(Note(side, kind, reason))

    def note(self, side: Side, kind: EntryKind, key: RecordKey, count: int, reason: str) -> None:
        """Note an entry that counts no record."""
        self._notes.append(Note(side, kind, reason, key, count))

    def take(self) -> tuple[Note, ...]:
        """Return what was noted since the last time."""
        taken, self._notes = tuple(self._notes), []
        return taken


class Outcome(NamedTuple):
    """What became of one pair."""

    number: int
    record: RecordVerdict | None
    notes: tuple[Note, ...]
    searched: bool
    """Whether it did not pass, and was searched for fingerprints."""


@dataclass(frozen=True, slots=True)
class Part:
    """What became of some pairs, in order."""

    outcomes: tuple[Outcome, ...]
    first: FirstOf
    rules: frozenset[int]
    """Rules that judged something."""
    noise_used: bool
    noise_moved: bool


def replay(notes: tuple[Note, ...], book: Book, pair: Pair) -> None:
    """Enter into the ledger what was noted about a pair."""
    for note in notes:
        if note.kind is None:
            book.compared(pair)
        elif note.key is None:
            book.short(note.side, note.kind, pair, note.reason)
        else:
            book.note(note.side, note.kind, note.key, note.size, note.reason)
