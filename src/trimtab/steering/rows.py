"""The rows of one forward pass, and which of them an op selects: computed once, shared by every site."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.steering.gains import Constant, Gain
from trimtab.steering.positions import Positions


class Selected(NamedTuple):
    """The rows that one op selects; `mask` None means every row, `gain` None means the constant of the op."""

    mask: Tensor | None
    gain: Tensor | None
    rows: int | Tensor

    @property
    def none(self) -> bool:
        """Whether no row is selected; on an accelerator that is not looked at."""
        return isinstance(self.rows, int) and self.rows == 0

    def part(self, start: int, stop: int) -> Selected:
        """Return the same for the rows [start, stop), on the CPU."""
        mask, count = None, stop - start
        if self.mask is not None:
            mask = self.mask[start:stop]
            count = int(mask.sum())
        gain = None if self.gain is None else self.gain[start:stop]
        return Selected(None if count == stop - start else mask, gain, count)


class Rows:
    """What a backend knows about the rows of one forward pass.

    Args:
        positions: absolute position of each row, int64 [N]; a negative one is padding: never selected, never changed.
        prompt_length: P, one number for all rows or int64 [N].
        token_ids: int64 [N], needed when a selection names token ids.
        padded: whether some position is negative; None looks (a device synchronisation on an accelerator).
    """

    __slots__ = ("_cache", "padded", "positions", "prompt_length", "token_ids")

    def __init__(
        self,
        positions: Tensor,
        prompt_length: int | Tensor,
        token_ids: Tensor | None = None,
        *,
        padded: bool | None = None,
    ) -> None:
        self.positions = positions
        self.prompt_length = prompt_length
        self.token_ids = token_ids
        self.padded = padded
        self._cache: dict[str, Selected] = {}

    def select(self, positions: Positions, gain: Gain, key: str) -> Selected:
        """Return the rows of a selection and their gains.

        Args:
            positions: the selection.
            gain: the gain; a constant is left to the op.
            key: a text that names both, to find them again at the next site.

        Raises:
            PositionError: the selection reaches before the prompt, or names token ids that were not given.
        """
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._select(positions, gain)
        return found

    def _select(self, positions: Positions, gain: Gain) -> Selected:
        values = None if isinstance(gain, Constant) else gain.at(self.steps())
        if positions.every:
            if self.padded is None:
                self.padded = bool((self.positions < 0).any())
            if not self.padded:
                return Selected(None, values, self.positions.numel())
        self._check(positions)
        mask = positions.mask(self.positions, self.prompt_length, self.token_ids)
        if mask.device.type != "cpu":
            return Selected(mask, values, mask.sum())
        count = int(mask.sum())
        return Selected(None if count == mask.numel() else mask, values, count)

    def steps(self) -> Tensor:
        """Return the decode step of each row, int64 [N]: position - P, at least 0."""
        return (self.positions - self.prompt_length).clamp_(min=0)

    def _check(self, positions: Positions) -> None:
        lengths = self.prompt_length
        if isinstance(lengths, Tensor):
            if lengths.device.type != "cpu":
                return  # looking would stall the device; the backend checks each request before it starts
            for length in torch.unique(lengths[self.positions >= 0]).tolist():
                positions.check(length)
        else:
            positions.check(lengths)
