"""Rows of sites, gathered per request and handed to the writer in bounded pieces.

Prompt rows go out as soon as their site has run. Decode rows are held back per site and written when their share of the
memory is full, so memory does not grow with the number of generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import BackendError
from trimtab.sites import Site

if TYPE_CHECKING:
    from trimtab.trace import Writer

_MAX_STEPS = 128  # decode steps that wait at most, whatever their width


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
    held: Tensor | None = None
    """[steps, batch, 1, ...]: room for the decode steps that wait to be written."""
    passes: list[Taken] = field(default_factory=list)
    """The steps that wait."""


class RowSink:
    """Writes the rows of one batch.

    Args:
        writer: takes `write(name, tensor, **columns)`.
        owners: the requests of the batch.
        slots: how many slots will be used, to share the memory.
        config: name of the configuration.
        counts: rows written per site, added to.
        buffer_bytes: memory of all decode rows that wait.
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
        if x.shape[:2] != (len(self._owners), taken.width):
            raise BackendError(
                f"{slot.site} has the shape {tuple(x.shape)}; rows are captured from [{len(self._owners)}, "
                f"{taken.width}, ...], one per token; record other tensors with the dumper"
            )
        if taken.width > 1:
            self.flush(slot)
            for member in slot.members:
                self._write_prompt(slot, x, member, taken)
        elif any([taken.places[member] for member in slot.members]):
            self._hold(slot, x, taken)

    def _write_prompt(self, slot: Slot, x: Tensor, member: int, taken: Taken) -> None:
        places = taken.places[member]
        if not places:
            return
        first, last = places[0], places[-1]
        whole = last - first + 1 == len(places)
        rows = x[member, first : last + 1] if whole else x[member, torch.tensor(places, device=x.device)]
        self._write(slot, rows.to("cpu"), member, taken.positions[member])

    def _hold(self, slot: Slot, x: Tensor, taken: Taken) -> None:
        if slot.held is None:
            # one block per slot, used again and again: small copies between the cache's growing tensors would
            # fragment the heap
            steps = max(1, min(_MAX_STEPS, self._slot_bytes // max(x.numel() * x.element_size(), 1)))
            slot.held = x.new_empty((steps, *x.shape))
        slot.held[len(slot.passes)].copy_(x)
        slot.passes.append(taken)
        if len(slot.passes) == len(slot.held):
            self.flush(slot)

    def flush(self, slot: Slot) -> None:
        """Write what a slot holds back."""
        if slot.held is None or not slot.passes:
            return
        passes, slot.passes = slot.passes, []
        held = slot.held[: len(passes), :, 0].to("cpu")
        for member in slot.members:
            columns = [column for column, taken in enumerate(passes) if taken.places[member]]
            if not columns:
                continue
            rows = held[columns[0] : columns[-1] + 1, member]
            if len(rows) != len(columns):
                rows = held[columns, member]
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
