"""What a whole side lacks, said once: a rank, steps, a tensor; not once for each of their records."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import polars as pl

from trimtab.compare._short import Short
from trimtab.compare._sides import Ints, Side

_BOTH = ("reference", "candidate")


class Absent:
    """Ranks, steps and tensors of the plain records of two sides."""

    def __init__(self, sides: tuple[Side, Side]) -> None:
        self._sides = {side.label: _Held.of(side) for side in sides}
        self._steps = {one: self._alone(one, other) for one, other in (_BOTH, _BOTH[::-1])}

    def _alone(self, mine: str, other: str) -> tuple[str, str]:
        """Name and reason of the steps that only one side has."""
        there = self._sides[other].steps
        gone = sorted(self._sides[mine].steps - there)
        name = f"step{'s' * (len(gone) > 1)} {spans(np.array(gone, dtype=np.int64))}"
        return name, f"the {other} has no such step; it has {spans(np.array(sorted(there), dtype=np.int64))}"

    def explained(self, short: Short) -> Short:
        """The same with its reason and its group, where the other side lacks the whole rank, step or tensor."""
        other = "candidate" if short.side == "reference" else "reference"
        have, key = self._sides[other], short.key
        if key.rank is not None and have.ranks and key.rank not in have.ranks:
            return dataclasses.replace(short, group=f"rank {key.rank}", reason=f"the {other} has no rank {key.rank}")
        if have.steps and key.step not in have.steps:
            group, reason = self._steps[short.side]
            return dataclasses.replace(short, group=group, reason=reason)
        if key.tensor not in have.tensors:
            return dataclasses.replace(short, group=key.tensor, reason=f"the {other} has no such tensor")
        return short

    def warning(self) -> str | None:
        """A doubt whether these are runs of one model, where most tensors of a side have no counterpart."""
        ours, theirs = (self._sides[label].tensors for label in ("reference", "candidate"))
        common = len(ours & theirs)
        if not ours or not theirs or 2 * common >= min(len(ours), len(theirs)):
            return None
        return (
            f"only {common} of {len(ours)} tensors of the reference and of {len(theirs)} of the candidate have the "
            "same name: are these runs of one model?"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """What one side has."""

    ranks: frozenset[int]
    steps: frozenset[int]
    tensors: frozenset[str]

    @classmethod
    def of(cls, side: Side) -> _Held:
        units = side.units.filter(~pl.col("by_row"))
        tensor = pl.when(pl.col("site") == "").then("name").otherwise("site")
        ranks = [{rank} if rank is not None else set() for rank in units["rank"].unique()]
        ranks += [set(layout.ranks) for layout in side.layouts]
        return cls(
            frozenset().union(*ranks), frozenset(units["step"].unique()), frozenset(units.select(tensor).to_series())
        )


def grouped(short: Sequence[Short]) -> list[Short]:
    """Take a group away from what is alone in it."""
    counts = Counter((one.side, one.kind, one.group) for one in short)
    return [
        dataclasses.replace(one, group="") if one.group and counts[one.side, one.kind, one.group] == 1 else one
        for one in short
    ]


def spans(numbers: Ints) -> str:
    """Numbers in order as text: "0-2, 5"."""
    if not numbers.size:
        return "none"
    ends = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    texts = [f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in ends]
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more runs" if len(texts) > 4 else "")
