"""Items to tensors: sequences of one micro-batch, padded on the right, or several in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.vectors.train.config import Rows
from trimtab.vectors.train.sequences import Item, TokenSequence, sequences


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Batch:
    """One forward pass; all tensors [B, T]."""

    key: str
    """Names the batch in the cache."""
    ids: Tensor
    positions: Tensor
    """Position in its own sequence."""
    owner: Tensor
    """Number of the sequence in this batch; -1 on padding."""
    targets: Tensor
    """Tokens that enter the loss."""
    prompt: Tensor
    """Prompt length of the sequence that a token belongs to."""
    packed: bool
    num_sequences: int
    num_targets: int

    def rows(self, positions: Rows) -> Tensor | None:
        """Return which rows are steered; None: all of them (padding is seen by nothing and has no gradient)."""
        if positions == "all":
            return None
        chosen = {
            "prompt": self.positions < self.prompt,
            "generated": self.positions >= self.prompt,
            "response": self.positions >= self.prompt - 1,
        }[positions]
        return chosen & (self.owner >= 0)

    @property
    def keep(self) -> Tensor:
        """Columns whose logits predict a target of any row."""
        return self.targets[:, 1:].any(0).nonzero()[:, 0]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        names = ("ids", "positions", "owner", "targets", "prompt")
        moved = {name: getattr(self, name).to(device) for name in names}
        return Batch(
            key=self.key,
            packed=self.packed,
            num_sequences=self.num_sequences,
            num_targets=self.num_targets,
            **moved,
        )


def make_batches(
    items: Sequence[Item], *, size: int, packing: bool, device: torch.device, name: str, by_length: bool = False
) -> list[Batch]:
    """Cut items into micro-batches of `size` items; their order is that of the items, or by falling length."""
    order = sorted(items, key=_length, reverse=True) if by_length else items
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [_collate(sequences(one), f"{name}{i}", packing).to(device) for i, one in enumerate(groups)]


def _length(item: Item) -> int:
    return max(len(one.ids) for one in sequences([item]))


def _collate(found: Sequence[TokenSequence], key: str, packing: bool) -> Batch:
    lines = _pack([len(one.ids) for one in found]) if packing else [[number] for number in range(len(found))]
    width = max(sum(len(found[i].ids) for i in line) for line in lines)
    shape = (len(lines), width)
    ids, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    prompt, owner = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    positions = torch.arange(width).repeat(len(lines), 1)
    for row, line in enumerate(lines):
        start = 0
        for number in line:
            one = found[number]
            end = start + len(one.ids)
            ids[row, start:end] = torch.tensor(one.ids)
            targets[row, start + 1 : end] = torch.tensor(one.targets[1:])
            positions[row, start:end] = torch.arange(len(one.ids))
            owner[row, start:end], prompt[row, start:end] = number, one.prompt_length
            start = end
        if packing:
            positions[row, start:] = torch.arange(width - start)  # padding is one more sequence, which nobody sees
    return Batch(
        key=key,
        ids=ids,
        positions=positions,
        owner=owner,
        targets=targets,
        prompt=prompt,
        packed=any(len(line) > 1 for line in lines),
        num_sequences=len(found),
        num_targets=int(targets.sum()),
    )


def _pack(lengths: Sequence[int]) -> list[list[int]]:
    """First fit, longest first, into rows of the longest sequence."""
    room = max(lengths)
    lines: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((i for i, left in enumerate(free) if left >= lengths[number]), None)
        if place is None:
            lines.append([])
            free.append(room)
            place = len(lines) - 1
        lines[place].append(number)
        free[place] -= lengths[number]
    return lines
