"""Which token of a packed batch is which token of a padded one, by token ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab.errors import ComparisonError

Ints = npt.NDArray[np.int64]
IDS = "dispatched_ids"
"""The record that names the rows of dispatched tokens."""


@dataclass(frozen=True, slots=True)
class Stretches:
    """Runs of tokens, in the order in which both sides are compared."""

    starts: Ints
    lengths: Ints

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return int(self.lengths.sum())


@dataclass(frozen=True, slots=True)
class TokenPairs:
    """Tokens of both sides in step, and what has no partner."""

    packed: Stretches
    padded: Stretches
    alone_packed: tuple[str, ...] = ()
    alone_padded: tuple[str, ...] = ()


def pair_tokens(packed: Ints, bounds: Sequence[int], padded: Ints, mask: npt.NDArray[np.bool_] | None) -> TokenPairs:
    """Find every packed sequence in the padded batch.

    Args:
        packed: token ids, [tokens].
        bounds: cumulative sequence lengths, from 0.
        padded: token ids, [batch, length].
        mask: which of them are tokens, [batch, length]; None: a sequence is looked for at either end of a row.

    Raises:
        ComparisonError: bounds that do not cut the tokens, a mask with holes.
    """
    if bounds[0] != 0 or bounds[-1] > len(packed) or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ComparisonError(f"cu_seqlens {list(bounds[:6])} do not cut {len(packed)} packed tokens")
    spans = None if mask is None else [_span(row, number) for number, row in enumerate(mask)]
    free = dict.fromkeys(range(len(padded)))
    found: list[tuple[int, int, int]] = []
    alone: list[str] = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        ids = packed[start:stop]
        for row in [number] * (number in free) + list(free) if len(ids) else ():
            at = _find(ids, padded[row], None if spans is None else spans[row])
            if at is not None:
                found.append((start, row * padded.shape[1] + at, len(ids)))
                del free[row]
                break
        else:
            alone += [f"sequence {number} ({len(ids)} tokens)"] if len(ids) else []
    rest = [f"row {row} of the batch" for row in free if spans is None or spans[row][1] > spans[row][0]]
    columns = np.asarray(found, dtype=np.int64).reshape(-1, 3)
    return TokenPairs(
        Stretches(columns[:, 0], columns[:, 2]), Stretches(columns[:, 1], columns[:, 2]), tuple(alone), tuple(rest)
    )


def pair_ids(ours: Ints, theirs: Ints) -> TokenPairs:
    """Pair the rows of two sides by their ids, in the order of the ids.

    Args:
        ours: [rows, parts of an id].
        theirs: the same.

    Raises:
        ComparisonError: ids that do not tell rows apart, or of other parts.
    """
    if ours.shape[1] != theirs.shape[1]:
        raise ComparisonError(f"ids of {ours.shape[1]} numbers in the reference, of {theirs.shape[1]} in the candidate")
    names, numbers = np.unique(np.concatenate([ours, theirs]), axis=0, return_inverse=True)
    sides = np.split(numbers.reshape(-1), [len(ours)])
    for label, side in zip(("reference", "candidate"), sides, strict=True):
        values, counts = np.unique(side, return_counts=True)
        if len(values) != len(side):
            twice = names[values[np.argmax(counts > 1)]].tolist()
            raise ComparisonError(
                f"{IDS} do not tell rows apart: {twice} is on {int(counts.max())} rows of the {label}; give every row "
                "an id of its own, such as (token, expert)"
            )
    common, at, at_c = np.intersect1d(sides[0], sides[1], assume_unique=True, return_indices=True)
    cuts = np.flatnonzero((np.diff(at) != 1) | (np.diff(at_c) != 1)) + 1
    begins = np.concatenate([[0], cuts]).astype(np.int64) if len(common) else np.zeros(0, dtype=np.int64)
    lengths = np.diff(np.concatenate([begins, [len(common)]]))
    alone = [
        tuple(f"id {names[one].tolist()}" for one in np.setdiff1d(side, common, assume_unique=True)) for side in sides
    ]
    return TokenPairs(Stretches(at[begins], lengths), Stretches(at_c[begins], lengths), alone[0], alone[1])


def _find(ids: Ints, row: Ints, span: tuple[int, int] | None) -> int | None:
    """Where in a row a sequence lies: in its unmasked part, which it must fill, or at either end."""
    size = len(ids)
    if span is not None:
        return span[0] if span[1] - span[0] == size and np.array_equal(row[span[0] : span[1]], ids) else None
    if size <= len(row):
        for start in (0, len(row) - size):
            if np.array_equal(row[start : start + size], ids):
                return start
    return None


def _span(row: npt.NDArray[np.bool_], number: int) -> tuple[int, int]:
    at = np.flatnonzero(row)
    if not at.size:
        return (0, 0)
    if at[-1] - at[0] + 1 != at.size:
        raise ComparisonError(f"the attention mask of row {number} has holes; tokens of a sequence lie side by side")
    return int(at[0]), int(at[-1]) + 1
