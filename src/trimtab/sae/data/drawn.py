"""SyntheticSource: sparse dictionaries whose features are known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from trimtab.sae.data.chunk import UNKNOWN, Chunk
from trimtab.sae.synthetic import SparseDictionary


class SyntheticSource:
    """Activations of a sparse dictionary, at the one site "x".

    Args:
        dictionary: the features and how often they are active.
        rows: of one epoch, after which the same activations come again.
        chunk_rows: rows of one chunk.
        seed: of the activations; the dictionary has its own.
    """

    special: frozenset[int] = frozenset()

    def __init__(
        self, dictionary: SparseDictionary, *, rows: int = 1 << 26, chunk_rows: int = 4096, seed: int = 0
    ) -> None:
        self.dictionary = dictionary
        self._chunk, self._chunks, self._seed, self._at = chunk_rows, -(-rows // chunk_rows), seed, 0
        self.name = f"synthetic:{dictionary.num_features}x{dictionary.d}"

    @property
    def widths(self) -> Mapping[str, int]:
        """Of the one site."""
        return {"x": self.dictionary.d}

    def chunks(self) -> Iterator[Chunk]:
        """Yield chunks; each is drawn from a seed of its own, so that none before it is needed."""
        while self._at < self._chunks:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._at)
            self._at += 1
            x, _ = self.dictionary.draw(self._chunk, generator)
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
        digest = hashlib.blake2b(self.dictionary.features.numpy().tobytes(), digest_size=8)
        digest.update(self.dictionary.frequencies.numpy().tobytes())
        return {
            "kind": "synthetic",
            "name": self.name,
            "chunk_rows": self._chunk,
            "chunks": self._chunks,
            "seed": self._seed,
            "digest": digest.hexdigest(),
        }

    def close(self) -> None:
        """Nothing to let go of."""
