"""A batch on the model: its left-padded layout, and the rows of each forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimtab.backends._capture import Taken
from trimtab.backends._item import Item
from trimtab.steering import Positions, Program, Rows

# Shapes: B requests, S places of one forward pass, R = B * S.


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one forward pass that share a program."""

    program: Program
    index: Tensor | None
    """Their places among the R rows, int64 on the model's device; None when `rows` covers all R."""
    rows: Rows
    owners: Tensor
    """Index of the request of each row, int64."""


class Roster:
    """What all passes of a batch share: its requests, who is steered by what, and the device of the model."""

    def __init__(self, items: Sequence[Item], device: torch.device) -> None:
        self.items = items
        self.device = device
        self.lengths = torch.tensor([item.length for item in items])
        programs = {id(item.program): item.program for item in items if item.program}
        self.steered = [
            (program, [index for index, item in enumerate(items) if item.program is program])
            for program in programs.values()
        ]
        """Every program and the requests that it steers."""
        self._owners: dict[int, Tensor] = {}

    def owners(self, width: int) -> Tensor:
        """Return the index of the request of each of the B * width rows, on the CPU."""
        found = self._owners.get(width)
        if found is None:
            found = self._owners[width] = torch.arange(len(self.items)).repeat_interleave(width)
        return found

    def prompt_length(self, members: Sequence[int], owners: Tensor) -> int | Tensor:
        """Return P of the rows: one number when the members agree, else int64 [N] on the model's device."""
        first = self.items[members[0]].length
        if all(self.items[member].length == first for member in members):
            return first
        return self.lengths[owners].to(self.device)


class Pass:
    """One forward pass of a batch.

    Args:
        roster: what the passes of the batch share.
        ids: int64 [B, S] on the CPU.
        positions: absolute positions, int64 [B, S] on the CPU; -1 at pads and in the rows of finished requests.
        whole: whether no position is -1.
        keeps_logits: whether the logits of the last place of this pass predict a token.
    """

    def __init__(
        self, roster: Roster, ids: Tensor, positions: Tensor, *, whole: bool, keeps_logits: bool = True
    ) -> None:
        self.roster = roster
        self.items = roster.items
        self.ids = ids
        self.positions = positions
        self.whole = whole
        self.keeps_logits = keeps_logits
        self.width = ids.shape[1]
        """S."""

    @cached_property
    def tail(self) -> Pass:
        """The last place alone: what the logits have when only the last row is asked for."""
        if self.width == 1:
            return self
        ids, positions = self.ids[:, -1:], self.positions[:, -1:]
        whole = self.whole or bool((positions >= 0).all())
        return Pass(self.roster, ids, positions, whole=whole, keeps_logits=self.keeps_logits)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The steered rows, by program."""
        groups = []
        for program, members in self.roster.steered:
            index = None
            if not self.whole or len(members) < len(self.items):
                inside = torch.zeros(len(self.items), 1, dtype=torch.bool)
                inside[members] = True
                index = (inside & (self.positions >= 0)).reshape(-1).nonzero()[:, 0]
                if not len(index):
                    continue
            groups.append(self._make_group(program, members, index))
        return tuple(groups)

    def _make_group(self, program: Program, members: Sequence[int], index: Tensor | None) -> Group:
        device = self.roster.device
        positions, ids, owners = self.positions.reshape(-1), self.ids.reshape(-1), self.roster.owners(self.width)
        if index is not None:
            positions, ids, owners = positions[index], ids[index], owners[index]
        length = self.roster.prompt_length(members, owners)
        if device.type != "cpu":
            positions, ids, owners = positions.to(device), ids.to(device), owners.to(device)
            index = None if index is None else index.to(device)
        return Group(program, index, Rows(positions, length, ids, padded=False), owners)

    def taken(self, wanted: Positions) -> Taken:
        """Return the rows that a capture wants, per request."""
        selected = self.positions >= 0
        if not wanted.every:
            lengths = self.roster.lengths[self.roster.owners(self.width)]
            flat = wanted.mask(self.positions.reshape(-1), lengths, self.ids.reshape(-1))
            selected = selected & flat.reshape(selected.shape)
        if self.width == 1:
            marks, places = selected[:, 0].tolist(), self.positions[:, 0].tolist()
            index = [[0] if mark else [] for mark in marks]
            return Taken(index, [[place] if mark else [] for mark, place in zip(marks, places, strict=True)], 1)
        index = [row.nonzero()[:, 0].tolist() for row in selected]
        positions = [row[mark].tolist() for row, mark in zip(self.positions, selected, strict=True)]
        return Taken(index, positions, self.width)


class Layout:
    """Left padding: the token ids, mask and positions of a batch, prompt first and then one token at a time.

    A finished request keeps running on a filler token at its last position, so that the schedule of the others does not
    change; its rows have position -1 and are neither steered, nor counted, nor captured.
    """

    def __init__(self, items: Sequence[Item], *, filler: int, device: torch.device) -> None:
        self._items = items
        self._filler = filler
        self._roster = Roster(items, device)
        self._device = device
        self.width = max(item.length for item in items)
        ids, places = [], []
        for item in items:
            pad = self.width - item.length
            ids.append([filler] * pad + list(item.prompt.ids))
            places.append([-1] * pad + list(range(item.length)))
        self.ids = torch.tensor(ids)
        self.positions = torch.tensor(places)
        self.padded = any(item.length < self.width for item in items)
        budget = max(item.request.budget for item in items)
        mask = torch.ones(len(items), self.width + budget, dtype=torch.int64)
        mask[:, : self.width] = self.positions >= 0
        self.mask = mask.to(device)

    def chunks(self, size: int | None) -> list[tuple[int, int]]:
        """Return the half-open ranges of the prompt that run in one pass each."""
        step = self.width if size is None else size
        return [(start, min(start + step, self.width)) for start in range(0, self.width, step)]

    def prompt_pass(self, start: int, end: int) -> Pass:
        """Return the pass over a range of the padded prompts."""
        ids, positions = self.ids[:, start:end], self.positions[:, start:end]
        return Pass(self._roster, ids, positions, whole=not self.padded, keeps_logits=end == self.width)

    def next_pass(self) -> Pass:
        """Return the pass over the token that each request has just got."""
        ids, places = [], []
        for item in self._items:
            running = item.stop is None
            ids.append([item.tokens[-1] if running else self._filler])
            places.append([item.length + len(item.tokens) - 1 if running else -1])
        whole = all(item.stop is None for item in self._items)
        return Pass(self._roster, torch.tensor(ids), torch.tensor(places), whole=whole)

    def model_positions(self, step: Pass) -> Tensor:
        """Return what the model is told: the absolute positions, pads at 0, finished requests at their last row."""
        places = step.positions
        if step.width == 1 and not step.whole:
            last = torch.tensor([[max(item.rows - 1, 0)] for item in self._items])
            places = torch.where(places < 0, last, places)
        return (places if step.whole else places.clamp(min=0)).to(self._device)
