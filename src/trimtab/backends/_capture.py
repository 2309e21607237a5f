"""Rows of sites, gathered per request and handed to the writer in bounded pieces.

Prompt rows go out as soon as their site has run. Decode rows collect in one buffer per site, which is written when it
is full, so memory does not grow with the number of generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import BackendError
from trimtab.sites import Site

if TYPE_CHECKING:
    from trimtab.trace import Writer

_MAX_STEPS = 256  # decode steps that a buffer holds at most, whatever its width


class RowOwner(NamedTuple):
    """The request that rows belong to."""

    name: str
    prompt_index: int


class Taken(NamedTuple):
    """Which rows of one forward pass are wanted, per request of the batch."""

    places: list[list[int]]
    """Places along the sequence axis, ascending; empty for a request that has none in this pass."""
    positions: list[list[int]]
    """Their absolute positions."""
    width: int
    """Length of the sequence axis of this pass."""


@dataclass(slots=True)
class Slot:
    """The rows of one site in one state, for the requests that have it."""

    site: Site
    edit: Literal["none", "before", "after"]
    members: tuple[int, ...]
    """Requests, as indices into the batch."""
    module_path: str | None = None
    buffer: Tensor | None = None
    passes: list[Taken] | None = None


class RowSink:
    """Writes the rows of one batch.

    Args:
        writer: takes `write(name, tensor, **columns)`.
        owners: the requests of the batch.
        slots: how many slots will be used, to share the memory.
        config: name of the configuration.
        counts: rows written per site, added to.
        buffer_bytes: memory of all decode buffers together.
    """

    def __init__(
        self,
        writer: Writer,
        owners: Sequence[RowOwner],
        *,
        slots: int,
        config: str,
        counts: dict[Site, int],
        buffer_bytes: int = 1 << 26,
    ) -> None:
        self._writer = writer
        self._owners = owners
        self._config = config
        self._slot_bytes = buffer_bytes // max(slots, 1)
        self._counts = counts

    def take(self, slot: Slot, x: Tensor, taken: Taken) -> None:
        """Take the wanted rows of a site.

        Args:
            slot: which rows these are.
            x: [batch, sequence, ...] of the whole batch; copied before this returns.
            taken: which of them are wanted.

        Raises:
            BackendError: the site does not hold one row per token.
        """
        if x.dim() < 2 or x.shape[:2] != (len(self._owners), taken.width):
            raise BackendError(
                f"{slot.site} has the shape {tuple(x.shape)}; rows are captured from [{len(self._owners)}, "
                f"{taken.width}, ...], one per token; record other tensors with the dumper"
            )
        if taken.width > 1:
            self.flush(slot)
            for member in slot.members:
                self._write_prompt(slot, x, member, taken)
        elif any(taken.places[member] for member in slot.members):
            self._buffer(slot, x, taken)

    def _write_prompt(self, slot: Slot, x: Tensor, member: int, taken: Taken) -> None:
        places = taken.places[member]
        if not places:
            return
        first, last = places[0], places[-1]
        whole = last - first + 1 == len(places)
        rows = x[member, first : last + 1] if whole else x[member, torch.tensor(places, device=x.device)]
        self._write(slot, rows, member, taken.positions[member])

    def _buffer(self, slot: Slot, x: Tensor, taken: Taken) -> None:
        rows = x[:, 0] if len(slot.members) == x.shape[0] else x[list(slot.members), 0]
        if slot.buffer is None or slot.passes is None:
            row_bytes = rows.numel() * rows.element_size()
            steps = max(1, min(_MAX_STEPS, self._slot_bytes // max(row_bytes, 1)))
            slot.buffer = rows.new_empty((rows.shape[0], steps, *rows.shape[1:]))
            slot.passes = []
        slot.buffer[:, len(slot.passes)] = rows
        slot.passes.append(taken)
        if len(slot.passes) == slot.buffer.shape[1]:
            self.flush(slot)

    def flush(self, slot: Slot) -> None:
        """Write what a slot holds back."""
        if slot.buffer is None or not slot.passes:
            return
        passes, slot.passes = slot.passes, []
        held = slot.buffer[:, : len(passes)].to("cpu")
        for place, member in enumerate(slot.members):
            columns = [column for column, taken in enumerate(passes) if taken.places[member]]
            if not columns:
                continue
            rows = held[place, columns[0] : columns[-1] + 1]
            if len(rows) != len(columns):
                rows = held[place, columns]
            self._write(slot, rows, member, [passes[column].positions[member][0] for column in columns])

    def _write(self, slot: Slot, rows: Tensor, member: int, positions: list[int]) -> None:
        owner = self._owners[member]
        site = str(slot.site)
        self._counts[slot.site] = self._counts.get(slot.site, 0) + len(positions)
        self._writer.write(
            site,
            rows,
            site=site,
            layer=slot.site.layer,
            phase="inference",
            edit=slot.edit,
            config=self._config,
            prompt=owner.prompt_index,
            request=owner.name,
            positions=positions,
            module_path=slot.module_path,
        )
