"""What of one side is not compared."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.results.comparison import RecordKey


@dataclass(frozen=True, slots=True)
class Short:
    """Items of one side that will not be compared."""

    side: str
    kind: str
    key: RecordKey
    count: int
    reason: str
    group: str = ""
    """Entries with an equal group are reported as one."""
    excuse: str = ""
    """Why this is no failure."""
