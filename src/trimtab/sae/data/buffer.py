"""ShuffleBuffer: rows are drawn at random and their places filled again; memory is one block per site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab._base import jsonio
from trimtab.errors import InputError

Values = dict[str, Tensor]


class ShuffleBuffer:
    """A block of rows per site, from which batches are drawn without replacement.

    Each batch leaves `batch_size` free places, which the next rows of the source fill before the next draw: a row waits
    `rows / batch_size` batches on average, and the block is never copied.

    Args:
        widths: site -> width.
        rows: places.
        batch_size: rows of one draw.
        dtype: of the block.
        seed: of the draws.
        refill: returns the next rows of the source, at least one, site -> [n, width] of `dtype`.

    Raises:
        InputError: fewer places than a batch.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        rows: int,
        batch_size: int,
        dtype: torch.dtype,
        seed: int,
        refill: Callable[[], Values],
    ) -> None:
        if batch_size < 1 or rows < batch_size:
            raise InputError(f"a buffer of {rows} rows for batches of {batch_size}; at least one batch was expected")
        self._rows, self._batch, self._refill = rows, batch_size, refill
        self._block = {site: torch.empty((rows, width), dtype=dtype) for site, width in widths.items()}
        self._free = torch.arange(rows)
        self._pending: Values = {site: block[:0] for site, block in self._block.items()}
        self._random = np.random.Generator(np.random.PCG64(seed))

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return sum(block.nbytes for block in self._block.values())

    def draw(self) -> Values:
        """Fill the free places and return a random batch, site -> [batch_size, width], a copy."""
        self.fill()
        drawn = torch.from_numpy(self._random.choice(self._rows, size=self._batch, replace=False))
        self._free = drawn
        return {site: block[drawn] for site, block in self._block.items()}

    def fill(self) -> None:
        """Put the next rows of the source into the free places."""
        while len(self._free):
            if not len(next(iter(self._pending.values()))):
                self._pending = self._refill()
            count = min(len(self._free), len(next(iter(self._pending.values()))))
            for site, block in self._block.items():
                block[self._free[:count]] = self._pending[site][:count]
            self._pending = {site: one[count:] for site, one in self._pending.items()}
            self._free = self._free[count:]

    def state(self) -> tuple[dict[str, Tensor], str]:
        """Return tensors and JSON that `load_state` continues from, without a copy of the block."""
        tensors = {f"block/{site}": block for site, block in self._block.items()}
        tensors |= {f"pending/{site}": one.contiguous() for site, one in self._pending.items()}
        return tensors | {"free": self._free}, jsonio.dumps(self._random.bit_generator.state)

    def load_state(self, tensors: Mapping[str, Tensor], random: str) -> None:
        """Set block, rows that wait, free places and generator."""
        for site, block in self._block.items():
            block.copy_(tensors[f"block/{site}"])
        self._pending = {site: tensors[f"pending/{site}"] for site in self._block}
        self._free = tensors["free"]
        state: dict[str, Any] = jsonio.loads(random)
        self._random.bit_generator.state = state
