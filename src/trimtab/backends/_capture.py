"""Rows of sites, gathered per request and handed to the writer in bounded pieces.

Rows are held back per site, so that a short generation is one record, and written when their share of the memory is
full; prompts too long for it go out as soon as their site has run. Memory does not grow with the number of tokens.
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
    prompt: tuple[Tensor, Taken] | None = None
    """[batch, sequence, ...] of the last pass over the prompts, when it waits to be written."""
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
        buffer_bytes: memory of all rows that wait.
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
        self._slot_bytes = buffer_bytes // (2 * max(slots, 1))  # half for prompts, half for steps
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
        if taken.width == 1:
            if any([taken.places[member] for member in slot.members]):
                self._hold(slot, x, taken)
            return
        self.flush(slot)
        if x.numel() * x.element_size() <= self._slot_bytes:
            slot.prompt = (x.clone(), taken)
            return
        for member in slot.members:
            if taken.places[member]:
                self._write(slot, _prompt_rows(x, taken, member).to("cpu"), member, taken.positions[member])

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
        """Write what a slot holds back, one record per request."""
        prompt, slot.prompt = slot.prompt, None
        passes, slot.passes = slot.passes, []
        held = None if slot.held is None or not passes else slot.held[: len(passes), :, 0].to("cpu")
        for member in slot.members:
            parts, positions = [], []
            if prompt is not None and prompt[1].places[member]:
                parts.append(_prompt_rows(*prompt, member).to("cpu"))
                positions += prompt[1].positions[member]
            columns = [column for column, taken in enumerate(passes) if taken.places[member]]
            if held is not None and columns:
                whole = columns[-1] - columns[0] + 1 == len(columns)
                parts.append(held[columns[0] : columns[-1] + 1, member] if whole else held[columns, member])
                positions += [passes[column].positions[member][0] for column in columns]
            if parts:
                self._write(slot, parts[0] if len(parts) == 1 else torch.cat(parts), member, positions)

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


def _prompt_rows(x: Tensor, taken: Taken, member: int) -> Tensor:
    """Return the wanted rows of one request, a view where they lie together."""
    places = taken.places[member]
    if places[-1] - places[0] + 1 == len(places):
        return x[member, places[0] : places[-1] + 1]
    return x[member, torch.tensor(places, device=x.device)]
