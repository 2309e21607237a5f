"""Stream: a source, filtered, shuffled and scaled, as batches; it can stop after any batch and go on with the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab._base import jsonio
from trimtab.errors import InputError, NonFiniteError, RecipeError
from trimtab.numerics import resolve_dtype
from trimtab.results import to_dict
from trimtab.sae.data.buffer import ShuffleBuffer, Values
from trimtab.sae.data.chunk import ActivationSource
from trimtab.sae.data.filters import Filters, SiteMeasure, kept_norms, lengths, measure
from trimtab.sae.data.prefetch import Prefetch

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How activations become batches."""

    batch_size: int = 4096
    """Tokens of a training step."""
    buffer_rows: int = 65536
    """Tokens that are shuffled together; they bound the memory."""
    held_out: int = 8192
    """The first tokens, which are kept for evaluation and left out of the first pass over the data; 0: none."""
    storage: Dtype = "bfloat16"
    """What activations wait in."""
    prefetch: int = 2
    """Chunks that a thread keeps ready; 0 reads in the training's own thread."""
    seed: int = 0
    """Of the shuffling."""
    filters: Filters = field(default_factory=Filters)
    """What is left out."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("buffer_rows", 1), ("held_out", 0), ("prefetch", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} is {getattr(self, name)}; at least {least} was expected")
        if self.storage not in ("bfloat16", "float16", "float32"):
            raise RecipeError(f"storage is {self.storage!r}; bfloat16, float16 or float32 was expected")
        if self.buffer_rows < self.batch_size:
            raise RecipeError(
                f"buffer_rows is {self.buffer_rows} and batch_size {self.batch_size}; the buffer must hold a batch"
            )


class _Read(NamedTuple):
    """What the reading thread hands over: rows, and where the source stands after them."""

    values: Values
    norms: dict[str, Tensor]
    cursor: dict[str, int]
    epoch: int
    rows: int
    by_token: int


@dataclass(slots=True)
class _Counts:
    """Tokens so far."""

    read: int = 0
    by_token: int = 0
    by_norm: int = 0


class Stream:
    """Batches of activations, divided by the norm of their site.

    Activations are read in a thread, filtered, kept in a shuffling buffer in low precision, and come out as float32
    batches with a mean squared length of 1 (measured on the first rows and then fixed). The source is repeated without
    end. What is given out depends on the source and the settings alone, not on timing.

    Args:
        source: the activations; read when they are first asked for, closed with the stream.
        config: the settings.

    Raises (from the first use on):
        InputError: no activation at all, or a site whose activations are all the same.
        NonFiniteError: an activation is NaN or infinite; names record and token.
    """

    def __init__(self, source: ActivationSource, config: StreamConfig | None = None) -> None:
        self.source, self.config = source, config or StreamConfig()
        self.widths: dict[str, int] = dict(source.widths)
        self._dtype = resolve_dtype(self.config.storage)
        self._counts = _Counts()
        self._cursor, self._epoch = source.state(), 0
        self._skip = 0
        self._ahead: deque[_Read] = deque()
        self._prefetch: Prefetch[_Read] | None = None
        self._buffer = ShuffleBuffer(
            self.widths,
            rows=self.config.buffer_rows,
            batch_size=self.config.batch_size,
            dtype=self._dtype,
            seed=self.config.seed,
            refill=self._refill,
        )
        self._measured: dict[str, SiteMeasure] = {}
        self._held: Values = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """Return the next batch, site -> float32 [batch_size, width]."""
        self._begin()
        return self._scaled(self._buffer.draw())

    @property
    def measured(self) -> dict[str, SiteMeasure]:
        """Site -> its scale."""
        self._begin()
        return self._measured

    @property
    def held_out(self) -> dict[str, Tensor]:
        """The tokens that are kept for evaluation and never trained on: site -> float32 [rows, width], scaled."""
        self._begin()
        return self._scaled(self._held)

    @property
    def epoch(self) -> int:
        """Passes over the data that were finished when the last rows were read."""
        return self._epoch

    def about(self) -> dict[str, Any]:
        """Return what the manifest says of the data, filters and scale among it, as plain JSON."""
        counts = self._counts
        return {
            "source": self.source.about(),
            "config": jsonio.plain(to_dict(self.config)),
            "measured": {site: jsonio.plain(to_dict(one)) for site, one in self.measured.items()},
            "tokens_read": counts.read,
            "left_out_by_token": counts.by_token,
            "left_out_by_norm": counts.by_norm,
            "held_out": len(next(iter(self._held.values()))),
            "epochs": self._epoch,
        }

    def state(self) -> tuple[dict[str, Tensor], str]:
        """Return tensors and JSON from which `load_state` goes on with the very next batch."""
        self._begin()
        tensors, random = self._buffer.state()
        state = {
            "random": random,
            "cursor": self._cursor,
            "epoch": self._epoch,
            "skip": self._skip,
            "counts": to_dict(self._counts),
            "measured": {site: to_dict(one) for site, one in self._measured.items()},
        }
        return tensors | {f"held/{site}": one for site, one in self._held.items()}, jsonio.dumps(state)

    def load_state(self, tensors: Mapping[str, Tensor], state: str) -> None:
        """Go on where `state` was taken; source and settings must be the same."""
        self._end_reading()
        found = jsonio.loads(state)
        self._cursor, self._epoch, self._skip = found["cursor"], found["epoch"], found["skip"]
        self._counts = _Counts(**found["counts"])
        self._measured = {
            site: SiteMeasure(rows=one.pop("rows"), **{name: float(value) for name, value in one.items()})
            for site, one in found["measured"].items()
        }
        self._held = {site: tensors[f"held/{site}"] for site in self.widths}
        self._buffer.load_state(tensors, found["random"])
        self.source.load_state(self._cursor)
        self._prefetch = Prefetch(self._read(self._epoch, fresh=False), depth=self.config.prefetch)

    def close(self) -> None:
        """End the reading thread and close the source."""
        self._end_reading()
        self.source.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _end_reading(self) -> None:
        self._ahead.clear()
        if self._prefetch is not None:
            self._prefetch.close()

    def _read(self, epoch: int, *, fresh: bool) -> Iterator[_Read]:
        """Read on without end, in the reading thread: filter by token, round to the storage dtype."""
        filters = self.config.filters
        while True:
            rows = dropped = 0
            for chunk in self.source.chunks():
                kept = filters.kept_tokens(chunk.tokens, self.source.special)
                values = {site: self._stored(site, one, kept) for site, one in chunk.values.items()}
                count = len(next(iter(values.values())))
                rows, dropped = rows + count, dropped + chunk.rows - count
                norms = {site: lengths(one) for site, one in values.items()}
                yield _Read(values, norms, self.source.state(), epoch, chunk.rows, chunk.rows - count)
            if fresh and not rows:
                why = f"its {dropped} tokens were all filtered out" if dropped else "it is empty"
                raise InputError(f"{self.source.name}: there is no activation to train on: {why}")
            epoch, fresh = epoch + 1, True
            self.source.rewind()

    def _stored(self, site: str, values: Tensor, kept: Tensor | None) -> Tensor:
        stored = (values if kept is None else values[kept]).to(self._dtype)
        if self._dtype is torch.float16 and not bool(torch.isfinite(stored).all()):
            raise NonFiniteError(
                f"{self.source.name}: activations of {site} up to {float(values.abs().max()):.4g} leave the range of "
                "float16 (65504); keep them in bfloat16"
            )
        return stored

    def _begin(self) -> None:
        """Read the first rows, measure them, and put the held-out ones aside; once."""
        if self._prefetch is not None:
            return
        self._prefetch = Prefetch(self._read(0, fresh=True), depth=self.config.prefetch)
        held = self.config.held_out
        wanted = max(2 * held, held + max(self.config.batch_size, _MEASURED))
        reads: list[_Read] = []
        while sum(map(_rows, reads)) < wanted and not (reads and reads[-1].epoch):
            reads.append(self._prefetch.get())
        self._ahead.extend(reads)
        first = [one for one in reads if not one.epoch]  # without the beginning of the second pass
        values = {site: torch.cat([one.values[site] for one in first]) for site in self.widths}
        self._measured = measure(values, self.config.filters, self.source.name)
        kept = [self._within(one) for one in first]
        values = {site: torch.cat([one[site] for one in kept]) for site in self.widths}
        self._skip = min(held, len(next(iter(values.values()))) // 2)
        self._held = {site: one[: self._skip].clone() for site, one in values.items()}

    def _refill(self) -> Values:
        """Return the next rows for the buffer: counted, within the norm, without the held-out ones."""
        assert self._prefetch is not None
        while True:
            one = self._ahead.popleft() if self._ahead else self._prefetch.get()
            if one.epoch > self._epoch:
                self._skip = len(next(iter(self._held.values())))
            self._cursor, self._epoch = one.cursor, one.epoch
            values = self._within(one)
            count = len(next(iter(values.values())))
            self._counts.read += one.rows
            self._counts.by_token += one.by_token
            self._counts.by_norm += _rows(one) - count
            skipped = min(self._skip, count)
            self._skip -= skipped
            if skipped < count:
                return {site: rows[skipped:] for site, rows in values.items()} if skipped else values

    def _within(self, one: _Read) -> Values:
        """Leave out the rows that are too long."""
        kept = kept_norms(one.norms, {site: self._measured[site].limit for site in one.values})
        return one.values if kept is None else {site: values[kept] for site, values in one.values.items()}

    def _scaled(self, values: Values) -> dict[str, Tensor]:
        return {site: one.float() / self._measured[site].norm for site, one in values.items()}


def _rows(one: _Read) -> int:
    return len(next(iter(one.values.values())))


_MEASURED = 16384  # rows that the scale is measured on at least, where there are so many
