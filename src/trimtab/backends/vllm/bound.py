"""A request in a worker: what steers it, which rows of it are recorded, and what was done so far."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from trimtab.backends.vllm.counts import Counted, Ints
from trimtab.backends.vllm.wire import RequestData
from trimtab.sites import Site
from trimtab.steering import Constant, Gain, Positions

if TYPE_CHECKING:
    from trimtab.steering import Program

Floats = np.ndarray[Any, np.dtype[np.float32]]
Key = tuple[Positions, Gain]
_MAX_SPANS = 64


@dataclass(frozen=True, slots=True)
class GainTable:
    """The gain of every row under every key of a steering; NaN where the key does not select the row.

    Attributes:
        rows: [T, K] for positions below T.
        tail: [K] for every position from T on; None when rows beyond T need their token ids.
        wide: [K] or more, the same as `tail` and NaN behind it.
        keys: what the columns are.
    """

    rows: Floats
    tail: Floats | None
    wide: memoryview[Any]
    keys: tuple[Key, ...]
    prompt_length: int
    _selected: dict[tuple[int, int], Ints | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, keys: tuple[Key, ...], prompt_ids: list[int], length: int, width: int = 0) -> GainTable:
        """Resolve the keys for one request.

        Args:
            keys: positions and gain.
            prompt_ids: the prompt's tokens.
            length: rows that the sequence has at most.
            width: numbers in `wide`.
        """
        prompt = len(prompt_ids)
        by_token = any(positions.needs_tokens for positions, _ in keys)
        constant = all(isinstance(gain, Constant) for _, gain in keys)
        if by_token:
            size = prompt
        elif constant:
            size = min(max(positions.settled(prompt) for positions, _ in keys) if keys else 0, length)
        else:
            size = length
        where = torch.arange(size + 1)
        ids = torch.tensor([*prompt_ids, -1]) if by_token else None
        values = _values(keys, where, prompt, ids)
        wide = np.full(max(width, len(keys)), np.nan, np.float32)
        wide[: len(keys)] = values[size]
        return cls(values[:size], None if by_token else values[size], wide.data, keys, prompt)

    def at(self, start: int, stop: int, token_ids: torch.Tensor | None = None) -> Floats:
        """Return the gains of rows [start, stop), float32 [n, K]."""
        size = len(self.rows)
        if stop <= size:
            return self.rows[start:stop]
        if start >= size and self.tail is not None:
            return self.tail[None]
        if self.tail is None:
            if stop - start == 0 or token_ids is None:
                raise AssertionError("rows beyond the prompt need their token ids")
            return _values(self.keys, torch.arange(start, stop), self.prompt_length, token_ids)
        head = self.rows[start:size]
        return np.concatenate([head, np.broadcast_to(self.tail, (stop - max(start, size), len(self.keys)))])

    def selected(self, start: int, stop: int) -> Ints | None:
        """Return how many of the rows [start, stop) each key selects, int64 [K]; None when only their tokens tell."""
        known = self._selected
        if (start, stop) not in known:
            if len(known) >= _MAX_SPANS:
                known.clear()
            known[start, stop] = self._select(start, stop)
        return known[start, stop]

    def _select(self, start: int, stop: int) -> Ints | None:
        size = len(self.rows)
        if self.tail is None and stop > size:
            return None
        counts = (~np.isnan(self.rows[start:stop])).sum(axis=0)
        if self.tail is not None and stop > size:
            counts = counts + (stop - max(start, size)) * ~np.isnan(self.tail)
        return np.asarray(counts, dtype=np.int64)


def _values(keys: tuple[Key, ...], where: torch.Tensor, prompt: int, ids: torch.Tensor | None) -> Floats:
    columns = []
    for positions, gain in keys:
        value = gain.at((where - prompt).clamp_(min=0))
        columns.append(torch.where(positions.mask(where, prompt, ids), value, float("nan")))
    return torch.stack(columns, dim=1).numpy() if columns else np.empty((len(where), 0), np.float32)


class Bound(msgspec.Struct, gc=False):
    """A request that is steered, recorded or forced, for as long as the runner knows it."""

    req_id: str
    data: RequestData
    prompt_ids: list[int]
    number: int
    """Its place in the tables of a step, from 1."""
    slot: int = 0
    program: Program | None = None
    """Its steering, where an op of it runs outside the banks."""
    table: GainTable | None = None
    captured: Positions | None = None
    capture_sites: frozenset[Site] = frozenset()
    edits: tuple[str, ...] = ()
    special: tuple[Site, ...] = ()
    """Sites where an op of its steering runs outside the banks."""
    counted_ops: Counted | None = None
    """Its ops that are counted in this worker."""
    token_ids: torch.Tensor | None = None
    """Ids of its rows in this pass, when an op outside the banks selects by token."""
    done: int = 0
    """Rows computed so far, this pass included: positions below this one. `Step.settle` brings it up to date."""
    counted: int = 0
    """Rows computed before this pass."""
    cached: int = 0
    """Rows of the prompt that came from the prefix cache, and so were not computed."""
    skipped: tuple[tuple[int, int], ...] = ()
    """Rows that came from the prefix cache later, when it went on after it had been preempted: [first, last)."""
    first: bool = True
    alike_from: int = sys.maxsize
    """Position from which nothing of the request but the position changes from row to row, once `foresee` said so."""
    reach: int = -1
    """The last tap where its steering acts."""
    problems: list[str] = []
    """Why ops did not act where they should have."""
    watched: bool = False
    """Whether a pass needs more for it than its rows: tokens forced, logits looked at, full doses."""

    def __post_init__(self) -> None:
        data, capture = self.data, self.data.capture
        logits = data.check_logits or (capture is not None and capture.prompt_logits)
        self.watched = logits or data.forced is not None or data.dose == "full"

    @property
    def prompt_length(self) -> int:
        """P."""
        return len(self.prompt_ids)

    @property
    def needs_tokens(self) -> bool:
        """Whether the ids of its rows decide which are chosen."""
        steered = self.table is not None and self.table.tail is None
        return steered or (self.captured is not None and self.captured.needs_tokens)

    def selected(self) -> Ints | None:
        """Return how many of its computed rows each key selects, int64 [K]; None when only their tokens tell."""
        found = None if self.table is None else self.table.selected(self.cached, self.done)
        for start, stop in self.skipped:
            without = None if self.table is None else self.table.selected(start, stop)
            found = None if found is None or without is None else found - without
        return found

    def foresee(self) -> None:
        """Say from which position on its rows are alike."""
        steady = self.steady_from()
        if steady is not None:
            self.alike_from = max(steady, self.prompt_length)

    def steady_from(self) -> int | None:
        """Position from which nothing of the request changes from row to row; None when there is none."""
        if self.special or (self.captured is not None and self.captured.needs_tokens):
            return None
        steady = 0 if self.captured is None else self.captured.settled(self.prompt_length)
        if self.table is None:
            return steady
        return None if self.table.tail is None else max(steady, len(self.table.rows))
