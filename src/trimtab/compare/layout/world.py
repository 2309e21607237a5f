"""The ranks of a run: who there is, and at which coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from trimtab.compare.layout._types import Coordinates

RANKED = ("tp", "pp", "cp", "ep", "dp")


@dataclass(frozen=True, slots=True)
class World:
    """Ranks with their coordinates, and how many there are along each axis."""

    ranks: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: pl.DataFrame, manifest: Mapping[str, Any]) -> World:
        """Read the ranks of a run off its records and its plan.

        Args:
            records: with the columns rank, tp_rank, pp_rank, cp_rank, ep_rank, dp_rank.
            manifest: its plan's `coordinates` may say where every rank is: {"1": {"tp": 1}}.
        """
        columns = [f"{axis}_rank" for axis in RANKED]
        ranks = _stated(manifest)
        for row in records.select("rank", *columns).unique().sort("rank").iter_rows(named=True):
            known = ranks.setdefault(row["rank"] or 0, {})
            for axis, name in zip(RANKED, columns, strict=True):
                if row[name] is not None:  # copies of shards count along the axis that cuts; the plan knows better
                    known.setdefault(axis, row[name])
        sizes: dict[str, int] = {}
        for at in ranks.values():
            for axis, index in at.items():
                sizes[axis] = max(sizes.get(axis, 1), index + 1)
        return cls(dict(sorted(ranks.items())), sizes)

    def along(self, axis: str) -> World:
        """The same ranks, numbered along one axis: what a run means that declares one axis and recorded none."""
        numbers = {rank: {axis: number} for number, rank in enumerate(self.ranks)}
        return World(numbers, {axis: len(numbers)})

    @property
    def placed(self) -> bool:
        """Whether anything says where a rank is."""
        return any(self.ranks.values())

    def at(self, **coordinates: int) -> list[int]:
        """Ranks at these coordinates."""
        return [
            rank
            for rank, at in self.ranks.items()
            if all(at.get(axis, index) == index for axis, index in coordinates.items())
        ]

    def named(self, at: Coordinates) -> str:
        """A place, with its rank where one is known to be there."""
        ranks = self.at(**{axis: index for axis, index in at if axis in RANKED})
        where = " ".join(f"{axis}_rank={index}" if axis in RANKED else f"{axis}={index}" for axis, index in at)
        exact = [rank for rank in ranks if all(self.ranks[rank].get(axis) == index for axis, index in at)]
        return f"rank {exact[0]} ({where})" if len(exact) == 1 else where


def _stated(manifest: Mapping[str, Any]) -> dict[int, dict[str, int]]:
    """What the plan says of the ranks; anything else that it holds under that name is left alone."""
    plan = manifest.get("plan")
    section = plan.get("coordinates") if isinstance(plan, Mapping) else None
    found: dict[int, dict[str, int]] = {}
    for rank, at in section.items() if isinstance(section, Mapping) else ():
        if str(rank).isdigit() and isinstance(at, Mapping):
            found[int(rank)] = {axis: at[axis] for axis in RANKED if type(at.get(axis)) is int}
    return found


def lists_ranks(manifest: Mapping[str, Any]) -> bool:
    """Whether the plan says which ranks there are."""
    plan = manifest.get("plan")
    return isinstance(plan, Mapping) and isinstance(plan.get("ranks"), list)


def silent_ranks(records: pl.DataFrame, manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """Ranks that the plan names and that wrote nothing."""
    plan = manifest.get("plan")
    ranks = plan.get("ranks") if isinstance(plan, Mapping) else None
    if not isinstance(ranks, list) or records.is_empty():
        return ()
    wrote = set(records["rank"].to_list())
    return tuple(rank for rank in ranks if type(rank) is int and rank not in wrote)
