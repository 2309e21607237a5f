"""Writing a trace: the model's thread snapshots a tensor and goes on; another thread measures and commits."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import TracebackType
from typing import Any, Protocol, Self, Unpack

import torch

from trimtab.errors import InputError, TraceError, TraceWriteError
from trimtab.trace._fields import RecordFields, make_row
from trimtab.trace._format import DOSE, RECORD_ID_BASE, TOKENS, Level
from trimtab.trace._parts import Part
from trimtab.trace._session import close_session, open_session
from trimtab.trace._statistics import UNMEASURED, measure
from trimtab.trace._store import open_store
from trimtab.trace._tensors import Buffers, buffer, contiguous, digest, dtype_text, plain, snapshot
from trimtab.trace._worker import Worker

MIB = 1 << 20
_ROW_BYTES = 768  # what a queued row costs in memory, about


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """One token of a prompt or of its generation; log-probabilities are natural logarithms."""

    config: str
    prompt: int
    request: str
    position: int
    token_id: int
    text: str = ""
    logprob: float | None = None
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    generated: bool = False
    stage: str = "prefill"


@dataclass(frozen=True, kw_only=True, slots=True)
class DoseRow:
    """What one op did to one row: the projections are in hidden units, `ratio` is |c| / |h|."""

    config: str
    prompt: int
    request: str
    site: str
    op: str
    position: int
    p_before: float
    p_after: float
    cap_delta: float
    clamped: bool
    ratio: float


class Writer(Protocol):
    """What backends write to: a `TraceWriter` or a `NullWriter`."""

    def write(self, name: str, tensor: torch.Tensor, **fields: Unpack[RecordFields]) -> int:
        """Record a tensor; return its record id."""

    def write_tokens(self, rows: Iterable[TokenRow]) -> None:
        """Record tokens."""

    def write_dose(self, rows: Iterable[DoseRow]) -> None:
        """Record doses."""

    def flush(self) -> None:
        """Commit what was written."""

    def close(self) -> None:
        """Commit and end."""


class NullWriter:
    """A writer that keeps nothing: for measuring what capturing costs without the disk."""

    def __init__(self) -> None:
        self._count = 0

    def write(self, name: str, tensor: torch.Tensor, **fields: Unpack[RecordFields]) -> int:
        """Count the record; return its number."""
        self._count += 1
        return self._count - 1

    def write_tokens(self, rows: Iterable[TokenRow]) -> None:
        """Keep nothing."""

    def write_dose(self, rows: Iterable[DoseRow]) -> None:
        """Keep nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TraceWriter:
    """Writes one rank's part of a run; use it in a `with` block.

    `write` copies the tensor and returns; it blocks only while more than `queue_bytes` wait to be committed. Parts
    are committed when they reach `part_bytes` or `part_seconds`. A write that failed raises `TraceWriteError` at the
    next `write`, `flush` or `close`; what was committed before stays readable.

    Args:
        path: directory of the run, or an fsspec URL.
        kind: what the run is, such as "dump" or "generation"; in a generation trace positions name the rows.
        plan: what is going to be recorded, as plain JSON; a resumed run must have the same.
        provenance: where the tensors come from, as plain JSON; None collects versions, machine and command line.
        rank: number of this process among those that write the run.
        level: "values" keeps tensors, statistics and digests; "statistics" and "digests" keep no values.
        queue_bytes: bytes that may wait for the disk.
        part_bytes: size of a part.
        part_seconds: age of a part.
        max_bytes: most bytes of tensors that this rank may store.
        resume: continue an existing run of the same plan; what a killed writer left is repaired first.

    Raises:
        InputError: arguments that make no sense.
        TraceExistsError: the directory holds another run, or this one without `resume`.
        TraceLockedError: another process writes this rank.
        TraceWriteError: the directory cannot be written.

    Example:
        >>> with TraceWriter("runs/mine") as writer:  # doctest: +SKIP
        ...     writer.write("hidden", torch.ones(3, 8), step=0, layer=3)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        kind: str = "dump",
        plan: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        rank: int = 0,
        level: Level = "values",
        queue_bytes: int = 256 * MIB,
        part_bytes: int = 64 * MIB,
        part_seconds: float = 30.0,
        max_bytes: int | None = None,
        resume: bool = False,
    ) -> None:
        for name, value in (("queue_bytes", queue_bytes), ("part_bytes", part_bytes), ("part_seconds", part_seconds)):
            if not value > 0:
                raise InputError(f"{name}={value!r}: a positive number was expected")
        self._store = open_store(path)
        self._session = open_session(
            self._store, kind=kind, level=level, plan=plan, origin=provenance, rank=rank, resume=resume
        )
        self.path = self._store.root
        self.rank, self.kind, self.level = rank, kind, level
        self._max_bytes, self._stored = max_bytes, self._session.stored
        self._order = self._session.order
        self._numbering = threading.Lock()
        self._worker = Worker(queue_bytes, part_seconds)
        self._buffers = Buffers(part_bytes)
        self._sink = _Sink(
            self._store,
            rank,
            self._session.number,
            level,
            min(part_bytes, queue_bytes),
            self._buffers,
            self._worker.release,
            self._worker.fail,
        )
        self._closed = False
        self._worker.start(self._sink)

    def write(self, name: str, tensor: torch.Tensor, **fields: Unpack[RecordFields]) -> int:
        """Record a tensor as it is now.

        Args:
            name: what the tensor is; any text.
            tensor: any strided tensor.
            fields: columns of the record; see `RecordFields`.

        Returns:
            The record id, unique in the run.

        Raises:
            InputError: a field that is no column or has the wrong type; a tensor without plain bytes.
            TraceWriteError: an earlier write failed, or `max_bytes` would be exceeded.
        """
        self._check()
        row = make_row(name, fields, self.rank)
        bare = plain(tensor)
        dtype, shape, size = dtype_text(bare.dtype), list(bare.shape), bare.nbytes
        if self.kind == "generation":
            _check_rows(name, row["positions"], shape)
        kept = known = None
        if self.level == "values":
            self._reserve(name, size)
            kept = snapshot(bare, self._buffers)
        else:  # reading the tensor here costs less than the copy that another thread would read
            still = contiguous(bare)
            measured = UNMEASURED if self.level == "digests" else measure(still)
            known = (digest(buffer(still), dtype, shape), *measured)
            size = 0
        row["dtype"], row["shape"] = dtype, shape
        cost = size + _ROW_BYTES + len(name) + 16 * len(row["positions"] or ())
        with self._numbering:  # records are queued in the order of their numbers
            row["order"] = self._order
            row["record_id"] = record_id = self.rank * RECORD_ID_BASE + self._order
            self._worker.put((tuple(row.values()), kept, known, cost), cost)
            self._order += 1
        return record_id

    def write_tokens(self, rows: Iterable[TokenRow]) -> None:
        """Record tokens; they are committed with the part that is open."""
        self._write_rows("tokens", rows, TokenRow, tuple(TOKENS))

    def write_dose(self, rows: Iterable[DoseRow]) -> None:
        """Record doses; they are committed with the part that is open."""
        self._write_rows("dose", rows, DoseRow, tuple(DOSE))

    def flush(self) -> None:
        """Return when everything written so far is committed.

        Raises:
            TraceWriteError: a write failed.
        """
        self._check()
        self._worker.flush()
        self._check()

    def close(self, *, interrupted: str | None = None) -> None:
        """Commit everything, mark this rank complete and release it; closing twice is harmless.

        Args:
            interrupted: why the run ends early; `Trace.open` repeats it.

        Raises:
            TraceWriteError: a write failed.
        """
        if self._closed:
            return
        self._closed = True
        self._worker.close()
        if self._worker.error is not None:
            self._session.lock.release()
            raise self._failure()
        close_session(self._store, self.rank, self._session, self._order, interrupted)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            self.close()
            return
        try:
            self.close(interrupted=f"{type(value).__name__}: {value}")
        except TraceError as error:  # the error that ended the block goes on, and says this one too
            value.add_note(str(error))

    def _write_rows(self, table: str, rows: Iterable[Any], expected: type, names: Sequence[str]) -> None:
        self._check()
        listed = list(rows)
        for row in listed:
            if not isinstance(row, expected):
                raise InputError(f"{table} take {expected.__name__} rows, got {type(row).__name__}")
        if listed:
            assert tuple(listed[0].__slots__) == tuple(names)
            cost = 256 * len(listed)
            fields = attrgetter(*names)  # astuple would copy every field deeply
            self._worker.put((table, [fields(row) for row in listed], cost), cost)

    def _reserve(self, name: str, size: int) -> None:
        with self._numbering:
            if self._max_bytes is None or self._stored + size <= self._max_bytes:
                self._stored += size
                return
        raise TraceWriteError(
            f"{name!r} has {size} bytes and {self._stored} are written: more than max_bytes={self._max_bytes}; "
            "raise it, capture fewer sites or steps, or use level='statistics'; what was committed stays readable"
        )

    def _check(self) -> None:
        if self._worker.error is not None:
            raise self._failure()
        if self._closed:
            raise TraceWriteError(f"{self.path} is closed; open it again with resume=True")

    def _failure(self) -> TraceError:
        error = self._worker.error
        part = self._sink
        if isinstance(error, TraceError):
            text = f"{error} ({part.committed_records} records of this writer)"
            failure: TraceError = type(error)(text)
        else:
            failure = TraceWriteError(
                f"writing {self.path} failed: {type(error).__name__}: {error}; {part.committed_records} committed "
                "records stay readable"
            )
        failure.__cause__ = error
        return failure


class _Sink(Part):
    """The open part, fed by the queue."""

    def add(self, item: Any) -> None:
        if len(item) == 3:
            self.add_rows(*item)
        else:
            self.add_record(*item)


def _check_rows(name: str, positions: Sequence[int] | None, shape: Sequence[int]) -> None:
    if positions is None or not shape or len(positions) != shape[0]:
        given = "none" if positions is None else str(len(positions))
        raise InputError(
            f"{name!r} of shape {list(shape)} came with {given} positions; a generation trace takes one per row"
        )
