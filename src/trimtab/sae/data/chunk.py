"""What a source of activations gives, and what it must know of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab.errors import NonFiniteError

UNKNOWN = -1
"""Stands for a token id that a source does not know."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunk:
    """Rows of some sites that belong together: row i of every site is the same token."""

    values: Mapping[str, Tensor]
    """Site -> floats [rows, width] on the CPU, as they were in the model."""
    tokens: Tensor
    """int64 [rows]: token ids, or `UNKNOWN`."""

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


class ActivationSource(Protocol):
    """Activations in a fixed order, with a cursor.

    Two sources of equal arguments give equal bits, and a source whose cursor is set goes on with exactly the chunk that
    would have come next: a resumed training depends on both.
    """

    name: str
    """What it is, in a few words."""
    special: frozenset[int]
    """Ids of tokens that begin or pad a text."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Site -> width, in the order of the chunks."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks from the cursor to the end of the data; the cursor moves on before each is given out.

        Raises:
            NonFiniteError: an activation is NaN or infinite; names record or text, and token.
        """

    def state(self) -> dict[str, int]:
        """Return the cursor."""

    def load_state(self, state: Mapping[str, int]) -> None:
        """Set the cursor."""

    def rewind(self) -> None:
        """Set the cursor to the first chunk."""

    def about(self) -> dict[str, Any]:
        """Return what the manifest should say, as plain JSON; it decides whether a checkpoint fits."""

    def close(self) -> None:
        """Let go of models and files."""


def check_finite(site: str, values: Tensor, place: Callable[[int], str]) -> None:
    """Refuse rows that are not finite.

    Args:
        site: where they were taken.
        values: [rows, width].
        place: names a row, such as "record 3, position 7 (token 42)".

    Raises:
        NonFiniteError: names the first such row.
    """
    if bool(torch.isfinite(values.sum(dtype=torch.float64))) or bool(torch.isfinite(values).all()):
        return
    row = int((~torch.isfinite(values).all(dim=-1)).nonzero()[0])
    count = int((~torch.isfinite(values[row])).sum())
    raise NonFiniteError(
        f"{site}: {place(row)} holds {count} elements that are NaN or infinite, of {values.shape[-1]}; finite "
        "activations were expected: capture them again in bfloat16 or float32"
    )
