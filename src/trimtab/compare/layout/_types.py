"""A tensor as the records of several ranks, micro steps or passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from trimtab.compare.dims import Dim, Dims

Coordinates = tuple[tuple[str, int], ...]
"""Coordinate -> index, such as (("tp", 1),); sorted by name."""


class Run(NamedTuple):
    """A stretch of one axis, and where the ranks at some coordinates hold it."""

    start: int
    stop: int
    local: int
    at: Coordinates


@dataclass(frozen=True, slots=True)
class Piece:
    """One record that holds a part, or a term, of a tensor."""

    record_id: int
    rank: int
    at: Coordinates
    """Along the axes that cut the tensor, or of whose terms it is made."""
    shape: tuple[int, ...]
    digest: str | None
    stored: bool
    everywhere: Coordinates = ()
    """All coordinates of the record, for messages."""

    @property
    def text(self) -> str:
        """The rank and where it is, for messages."""
        return f"rank {self.rank}" + (f" ({spelled(self.everywhere)})" if self.everywhere else "")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor is made of its pieces."""

    dims: Dims | None
    """None: nobody said, and there is one piece."""
    pieces: tuple[Piece, ...]
    copies: tuple[tuple[Piece, ...], ...] = ()
    """Pieces that must be equal: the one that is used, then the others."""
    sequences: tuple[tuple[Coordinates, int], ...] = ()
    """Records of cumulative sequence lengths, and the coordinates that they hold for."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Records of the pieces."""
        return tuple(piece.record_id for piece in self.pieces)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that hold pieces or copies."""
        copies = (piece.rank for group in self.copies for piece in group)
        return tuple(sorted({*(piece.rank for piece in self.pieces), *copies}))

    @property
    def axes(self) -> tuple[Dim, ...] | None:
        """Axes of the tensor; None when nobody said."""
        return None if self.dims is None else self.dims.axes

    @property
    def records(self) -> int:
        """Records that make it up, copies counted."""
        return len(self.pieces) + sum(len(group) - 1 for group in self.copies)

    def same_as(self, other: Layout) -> bool:
        """Whether digests show that both are one tensor, cut in one way."""
        if len(self.pieces) != len(other.pieces):
            return False
        ours, theirs = self._signature(), other._signature()
        return ours is not None and ours == theirs and self.in_order_of(other)

    def in_order_of(self, other: Layout) -> bool:
        """Whether the axes of both come in one order, as far as they are named, and their elements, too."""
        ours, theirs = _names(self), _names(other)
        if ours is None or theirs is None:
            return not any(axis.groups for one in (self, other) for axis in one.axes or ())
        return ours == theirs

    def _signature(self) -> tuple[object, ...] | None:
        if any(piece.digest is None for piece in self.pieces):
            return None
        if len(self.pieces) == 1:
            return (self.pieces[0].digest,)
        cuts = (
            tuple((one.axis, one.how, one.scaled) for one in self.dims.splits() if one.how != "replicated")
            if self.dims
            else ()
        )
        return (cuts, tuple(sorted((piece.at, str(piece.digest)) for piece in self.pieces)))


def spelled(at: Coordinates) -> str:
    """Coordinates as text: "cp=1 tp=0"."""
    return " ".join(f"{axis}={index}" for axis, index in at)


def _names(layout: Layout) -> tuple[str, ...] | None:
    """Names of the axes; None where nobody gave any. `d0 d1`, as a dump counts axes of a sharded tensor, are none."""
    names = None if layout.axes is None else tuple(axis.text for axis in layout.axes)
    return None if names == tuple(f"d{dim}" for dim in range(len(names or ()))) else names
