"""TensorSource: activations that are in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.sae.data.chunk import UNKNOWN, Chunk, check_finite


class TensorSource:
    """Activations that are in memory.

    Args:
        values: [rows, width], or site -> such a tensor; all of the same number of rows.
        tokens: int64 [rows], the token ids.
        special: ids of tokens that begin or pad a text.
        chunk_rows: rows of one chunk.
        name: what they are.

    Raises:
        InputError: no row, shapes that do not fit, or integers.
    """

    def __init__(
        self,
        values: Tensor | Mapping[str, Tensor],
        *,
        tokens: Tensor | None = None,
        special: frozenset[int] = frozenset(),
        chunk_rows: int = 4096,
        name: str = "tensors",
    ) -> None:
        self._values = {"x": values} if isinstance(values, Tensor) else dict(values)
        if not self._values:
            raise InputError(f"{name}: no site was given; at least one tensor [rows, width] was expected")
        for site, one in self._values.items():
            if one.ndim != 2 or not one.dtype.is_floating_point:
                raise InputError(
                    f"{name}: {site} is {one.dtype} of shape {list(one.shape)}; floats [rows, width] were expected"
                )
        lengths = {site: len(one) for site, one in self._values.items()}
        self._rows = next(iter(lengths.values()))
        if len({*lengths.values()}) > 1 or (tokens is not None and len(tokens) != self._rows):
            raise InputError(f"{name}: the sites have {lengths} rows; one row a token, the same in each, was expected")
        if not self._rows:
            raise InputError(f"{name} is empty: there is no activation to train on")
        self._tokens = torch.full((self._rows,), UNKNOWN) if tokens is None else tokens
        self._chunk, self._at = chunk_rows, 0
        self.name, self.special = name, special

    @property
    def widths(self) -> Mapping[str, int]:
        """Site -> width."""
        return {site: one.shape[1] for site, one in self._values.items()}

    def chunks(self) -> Iterator[Chunk]:
        """Yield the rows from the cursor on."""
        while self._at < self._rows:
            begin, self._at = self._at, min(self._at + self._chunk, self._rows)
            values = {site: one[begin : self._at] for site, one in self._values.items()}
            tokens = self._tokens[begin : self._at]
            for site, one in values.items():
                check_finite(site, one, lambda row, b=begin, t=tokens: f"row {b + row} (token {int(t[row])})")  # type: ignore[misc]
            yield Chunk(values=values, tokens=tokens)

    def state(self) -> dict[str, int]:
        """Return the cursor."""
        return {"row": self._at}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Set the cursor."""
        self._at = state["row"]

    def rewind(self) -> None:
        """Set the cursor to the first row."""
        self._at = 0

    def about(self) -> dict[str, Any]:
        """Return name, rows, widths and a digest of the first and last rows."""
        digest = hashlib.blake2b(digest_size=8)
        for one in self._values.values():
            digest.update(one[:64].double().numpy().tobytes() + one[-64:].double().numpy().tobytes())
        return {
            "kind": "tensors",
            "name": self.name,
            "rows": self._rows,
            "widths": dict(self.widths),
            "digest": digest.hexdigest(),
        }

    def close(self) -> None:
        """Nothing to let go of."""
