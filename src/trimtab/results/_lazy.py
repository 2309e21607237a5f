"""Sequences of which most items are rows of a table, built where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args, overload

if TYPE_CHECKING:
    import polars as pl
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

T = TypeVar("T")
_CHUNK = 4096  # rows of the table that are Python objects at a time


class LazySequence(Sequence[T], Generic[T]):
    """A sequence, immutable: single items, and rows of a table between them.

    A million identical records stay eight columns; only who asks for one of them builds it.
    """

    __slots__ = ("_build", "order", "single", "table")

    def __init__(
        self,
        single: Iterable[T] = (),
        *,
        table: pl.DataFrame | None = None,
        build: Callable[[Mapping[str, Any]], T] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        """Join items and rows.

        Args:
            single: items as they are, in order.
            table: one row for each other item, in order.
            build: makes the item of a row; a function of a module, so that the sequence can be sent to a process.
            order: what comes when: a number of `table`, or `~number` of `single`; None: `single` alone.
        """
        assert table is None or (build is not None and order is not None)
        self.single = tuple(single)
        self.table = table
        self.order = order if order is not None else range(-1, -len(self.single) - 1, -1)
        self._build = build

    @property
    def rows(self) -> int:
        """How many items are rows of the table."""
        return 0 if self.table is None else self.table.height

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return tuple(self[one] for one in range(*index.indices(len(self))))
        at = int(self.order[index])
        if at < 0:
            return self.single[~at]
        assert self.table is not None and self._build is not None
        return self._build(self.table.row(at, named=True))

    def __iter__(self) -> Iterator[T]:
        made = self.from_table()
        for at in self.order:
            yield next(made) if at >= 0 else self.single[~at]

    def from_table(self) -> Iterator[T]:
        """Build the items that are rows, one after the other."""
        for begin in range(0, self.rows, _CHUNK):
            assert self.table is not None and self._build is not None
            yield from map(self._build, self.table.slice(begin, _CHUNK).iter_rows(named=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LazySequence | tuple | list):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """In JSON it is an array of its items."""
        from pydantic_core import core_schema

        items = core_schema.list_schema(handler.generate_schema(get_args(source)[0]))
        return core_schema.no_info_after_validator_function(
            cls,
            items,
            serialization=core_schema.wrap_serializer_function_ser_schema(
                lambda value, serialise: serialise(list(value)), schema=items
            ),
        )

    def __repr__(self) -> str:
        return repr(tuple(self))
