"""What the ops of a request did, as numbers in one array: a report of an op is made when somebody looks at it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from trimtab.sites import Site

Ints = np.ndarray[Any, np.dtype[np.int64]]
Names = tuple[tuple[str, str], ...]
"""Site and op, of every op of a steering, in order."""


class OpReport(NamedTuple):
    """What one op did in one request."""

    site: str
    op: str
    rows: int
    """Rows that it changed, counted where it ran."""
    clamped: int | None
    """Rows where a bound was active; None where that is not counted."""
    nonfinite: int
    """Rows that it made non-finite, clamped to the largest finite value."""
    selected: int | None
    """Rows that its positions select among those computed; None where tokens decide."""


class OpReports(Sequence[OpReport]):
    """The ops of one request, in order.

    Args:
        names: their sites and names.
        values: int64 [ops, 4]: rows, clamped, nonfinite, selected; -1 for None.
    """

    __slots__ = ("names", "values")

    def __init__(self, names: Names, values: Ints) -> None:
        self.names, self.values = names, values

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> OpReport: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[OpReport, ...]: ...
    def __getitem__(self, index: int | slice) -> OpReport | tuple[OpReport, ...]:
        if isinstance(index, slice):
            return tuple(self[one] for one in range(*index.indices(len(self))))
        rows, clamped, nonfinite, selected = self.values[index].tolist()
        return OpReport(*self.names[index], rows, _or_none(clamped), nonfinite, _or_none(selected))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class Counted:
    """The ops of a steering that one worker counts.

    Args:
        sites: per site, in order: its place among the banks, the site, and per op there its name, the column of its
            gain, and whether its clamped rows are counted.
    """

    def __init__(self, sites: Iterable[tuple[int, Site, Sequence[tuple[str, int, bool]]]]) -> None:
        self.listed = tuple(
            (str(site), name, bank, op, key, clamps)
            for bank, site, ops in sites
            for op, (name, key, clamps) in enumerate(ops)
        )
        """All that there is to it: of those that list the same, one is enough."""
        self.names: Names = tuple((site, name) for site, name, *_ in self.listed)
        places = np.array([one[2:5] for one in self.listed], dtype=np.int64).reshape(-1, 3)
        self._banks, self._ops, self._keys = places.T
        self._unclamped = np.array([not one[5] for one in self.listed], dtype=bool)
        self._some_unclamped = bool(self._unclamped.any())

    def values(self, counts: Sequence[Ints], selected: Sequence[Ints | None]) -> Ints:
        """Return what the ops did in some requests, int64 [requests, ops, 4] as in `OpReports`.

        Args:
            counts: of each, [banks, J, 3]: rows, clamped rows, rows that would not have been finite.
            selected: of each, int64 [keys], rows that each key selects; None where tokens decide.
        """
        values = np.empty((len(counts), len(self.names), 4), dtype=np.int64)
        values[:, :, :3] = np.array(counts)[:, self._banks, self._ops]
        if any(one is None for one in selected):
            for own, one in zip(values, selected, strict=True):
                own[:, 3] = -1 if one is None else one[self._keys]
        else:
            values[:, :, 3] = np.array(selected)[:, self._keys]
        if self._some_unclamped:
            values[:, self._unclamped, 1] = -1
        return values


NOTHING = OpReports((), np.empty((0, 4), dtype=np.int64))
"""Of a request without ops."""


def _or_none(value: int) -> int | None:
    return None if value < 0 else value
