"""What ranks hold that is declared, or was found, to be the same: compared before the pairs are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from trimtab.compare._sides import Side
from trimtab.compare.layout import Difference, Layout, Piece, differences, part_differences
from trimtab.errors import ComparisonError, TraceCorruptError
from trimtab.results.comparison import Side as SideName

if TYPE_CHECKING:
    from trimtab.compare.ledger import Book


def verify_copies(sides: Iterable[Side], book: Book, *, verify: bool) -> None:
    """Enter copies that differ into the ledger.

    Args:
        sides: reference and candidate.
        book: the ledger.
        verify: also hash the bytes of the copies again; those that are compared are hashed with their pair.
    """
    for side in sides:
        label: SideName = "reference" if side.label == "reference" else "candidate"
        for key, layout in zip(side.layout_keys, side.layouts, strict=True):
            for check in _checks(side, layout, verify):
                try:
                    for found in check:
                        book.note(label, "replica", key, 1, f"{found.piece.text} {found.reason}")
                except TraceCorruptError as error:
                    book.note(label, "corrupt", key, 1, str(error))
                except ComparisonError:
                    continue  # its pieces do not fit: the pair itself says so


def _checks(side: Side, layout: Layout, verify: bool) -> Iterator[Iterator[Difference]]:
    for copies in layout.copies:
        yield _compare(side, copies, verify)
    yield part_differences(layout, side.trace.tensor)


def _compare(side: Side, copies: tuple[Piece, ...], verify: bool) -> Iterator[Difference]:
    """Compare copies of one tensor.

    Raises:
        TraceCorruptError: the bytes of one are not what was written.
    """
    for piece in copies[1:] if verify else ():
        if piece.stored and piece.digest is not None and (found := side.trace.rehash(piece.record_id)) != piece.digest:
            raise TraceCorruptError(f"{piece.text}: its bytes hash to {found}, {piece.digest} was written")
    yield from differences(copies, side.trace.tensor)
