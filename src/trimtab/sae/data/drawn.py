"""SyntheticSource: sparse dictionaries whose features are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from trimtab.sae.data.chunk import UNKNOWN, Chunk
from trimtab.sae.synthetic import SparseDictionary


class SyntheticSource:
    """Activations of a sparse dictionary with known features, without end.

    Args:
        dictionary: the features and how often they are active.
        rows: of one epoch, after which the same activations come again.
        chunk_rows: rows of one chunk.
    """

    special: frozenset[int] = frozenset()

    def __init__(self, dictionary: SparseDictionary, *, rows: int = 1 << 24, chunk_rows: int = 4096) -> None:
        self.dictionary = dictionary
        self._chunk, self._chunks, self._at = chunk_rows, -(-rows // chunk_rows), 0
        num, width = dictionary.features.shape
        self.name = f"synthetic:{num}x{width}"

    @property
    def widths(self) -> Mapping[str, int]:
        """The one site, "x"."""
        return {"x": self.dictionary.features.shape[1]}

    def chunks(self) -> Iterator[Chunk]:
        """Yield chunks; the one at the cursor is drawn from its own seed, so that none before it is needed."""
        while self._at < self._chunks:
            x = self.dictionary.sample(self._chunk, index=self._at)
            self._at += 1
            yield Chunk(values={"x": x}, tokens=torch.full((len(x),), UNKNOWN))

    def state(self) -> dict[str, int]:
        """Return the cursor."""
        return {"chunk": self._at}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Set the cursor."""
        self._at = state["chunk"]

    def rewind(self) -> None:
        """Set the cursor to the first chunk."""
        self._at = 0

    def about(self) -> dict[str, Any]:
        """Return what decides the activations."""
        return {"kind": "synthetic", "name": self.name, "chunk_rows": self._chunk, **self.dictionary.about()}

    def close(self) -> None:
        """Nothing to let go of."""
