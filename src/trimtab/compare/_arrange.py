"""Both sides made comparable where ranks, micro steps or axes are laid out differently.

Records that nothing speaks of stay as they are where the same ranks hold them on both sides, or where no record and no
plan says what the ranks are. All others become tensors made of pieces (`layout`), without a rank in their identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from trimtab.compare._auxiliary import SEQUENCES
from trimtab.compare._short import Short
from trimtab.compare._sides import Side
from trimtab.compare._spoken import LOGICAL, Spoken
from trimtab.compare.dims import TOKENS, DimsRule
from trimtab.compare.layout import Arranged, Layout, World, arrange_group, collapse, lists_ranks, silent_ranks
from trimtab.errors import ComparisonError, InputError
from trimtab.results.comparison import RecordKey

_STAGE = re.compile(r"pp=\d+")
_Row = Mapping[str, Any]
_Group = dict[tuple[Any, ...], list[_Row]]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Two sides with their layouts, and what could not be arranged."""

    sides: tuple[Side, Side]
    short: tuple[Short, ...] = ()


def arrange(sides: tuple[Side, Side], rules: tuple[Sequence[DimsRule], Sequence[DimsRule]]) -> Arrangement:
    """Arrange two sides.

    Args:
        sides: reference and candidate, one unit per record.
        rules: dims given for the comparison, of either side; they take the place of those recorded.

    Raises:
        InputError: a rule that matches no tensor.
    """
    spoken = Spoken()
    frames = tuple(spoken.read(side, mine) for side, mine in zip(sides, rules, strict=True))
    idle = next((rule for rule in (*rules[0], *rules[1]) if rule not in spoken.used), None)
    if idle is not None:
        raise InputError(f"dims for {idle.pattern!r}: no tensor has such a name, or earlier dims take all that have")
    silent = tuple(one for side, frame in zip(sides, frames, strict=True) for one in _silent(side, frame))
    if not _laid_out(frames):
        return Arrangement(sides, silent)
    frames = spoken.join_micro_steps(frames)
    special = _special(frames, spoken)
    if special.is_empty():
        return Arrangement(sides, silent)
    plain = [frame.join(special, on=list(LOGICAL), how="anti", nulls_equal=True) for frame in frames]
    groups = [_grouped(frame.join(special, on=list(LOGICAL), how="semi", nulls_equal=True)) for frame in frames]
    builders = tuple(_Builder(side, frame, spoken) for side, frame in zip(sides, frames, strict=True))
    short: list[Short] = []
    for key in dict.fromkeys([*groups[0], *groups[1]]):
        short += _arrange_pair(key, (groups[0].get(key, []), groups[1].get(key, [])), builders)
    arranged = [builder.side(frame) for builder, frame in zip(builders, plain, strict=True)]
    return Arrangement((arranged[0], arranged[1]), (*silent, *short))


class _Builder:
    """Collects the arranged units of one side."""

    def __init__(self, side: Side, frame: pl.DataFrame, spoken: Spoken) -> None:
        self._side, self._spoken = side, spoken
        self._columns = [name for name in side.units.columns if name in frame.columns]
        self._schema = {name: side.units.schema[name] for name in self._columns}
        self.world = World.of(frame.filter(~pl.col("by_row")), side.manifest)
        self.placed = self.world.placed or lists_ranks(side.manifest)
        self.label = side.label
        self._layouts: list[Layout] = []
        self._keys: list[RecordKey] = []
        self._rows: list[dict[str, Any]] = []
        self._sequences = _sequence_records(frame)

    def arrange(self, rows: Sequence[_Row]) -> Arranged:
        """Sort the records of one tensor."""
        return arrange_group(rows, [self._spoken[row["dims"]] for row in rows], self.world)

    def parallel(self, rows: Sequence[_Row]) -> bool:
        """Whether the dims of these records speak of parallel axes."""
        return any((dims := self._spoken[row["dims"]]) is not None and dims.parallel for row in rows)

    def add(self, rows: Sequence[_Row], layout: Layout, coordinates: str, rank: int | None) -> None:
        """Add a unit that is made of pieces."""
        first = min(rows, key=lambda row: row["first_order"])
        layout = replace(layout, sequences=self._find_sequences(layout, first))
        self._layouts.append(layout)
        key = _key(tuple(first[name] for name in LOGICAL), rows)
        self._keys.append(replace(key, rank=rank, coordinates=coordinates))
        pieces = layout.pieces
        self._rows.append(
            {name: first[name] for name in self._columns}
            | {
                "rank": rank,
                "coordinates": coordinates,
                "ids": list(layout.ids),
                "digests": [piece.digest for piece in pieces],
                "positions": [None],
                "stored": all(piece.stored for piece in pieces),
                "layout": len(self._layouts) - 1,
                "records": layout.records,
            }
        )

    def side(self, plain: pl.DataFrame) -> Side:
        """The side with its plain and its arranged units."""
        frame = pl.concat([plain.select(self._columns), pl.DataFrame(self._rows, schema=self._schema)])
        return replace(self._side, units=frame, layouts=tuple(self._layouts), layout_keys=tuple(self._keys))

    def _find_sequences(self, layout: Layout, row: _Row) -> tuple[tuple[tuple[tuple[str, int], ...], int], ...]:
        """Cumulative sequence lengths for a tensor whose packed tokens are cut."""
        if not any(TOKENS in axis.names and axis.splits for axis in layout.axes or ()):
            return ()
        dp = {dict(piece.everywhere).get("dp") for piece in layout.pieces}
        micros = {index for piece in layout.pieces for axis, index in piece.at if axis == "micro"} or {row["micro"]}
        found = []
        for record in self._sequences.get((row["phase"], row["step"]), []):
            if record["micro"] in micros and (record["dp_rank"] in dp or None in (record["dp_rank"], *dp)):
                at = (("dp", record["dp_rank"]),) if record["dp_rank"] is not None else ()
                found.append(((*at, ("micro", record["micro"])), record["ids"][0]))
        return tuple(found)


def _arrange_pair(
    key: tuple[Any, ...], rows: tuple[list[_Row], list[_Row]], builders: tuple[_Builder, ...]
) -> list[Short]:
    """Arrange the records of one tensor on both sides; return what stands in the way."""
    record = _key(key, rows[0] or rows[1])
    arranged: list[Arranged] = []
    for at, builder in enumerate(builders):
        try:
            speaks = any(one.parallel(mine) for one, mine in zip(builders, rows, strict=True))
            same = _ranks(rows[0]) == _ranks(rows[1]) or not any(one.placed for one in builders)
            if not speaks and same:
                for row in rows[at]:
                    for layout in builder.arrange([row]).layouts.values():
                        builder.add([row], layout, "", row["rank"])
                continue
            arranged.append(builder.arrange(rows[at]) if rows[at] else Arranged({}))
        except ComparisonError as error:
            return _skipped(record, rows, builders, f"the {builder.label}: {error}")
    if not arranged:
        return []
    short = _drop_passed_on(record, arranged, rows, builders)
    blocked = ""
    for builder, one in zip(builders, arranged, strict=True):
        for problem in one.problems:
            short.append(Short(builder.label, "missing", record, 1, problem.reason, group=problem.rank))
            blocked = blocked or (f"{builder.label} without {problem.rank}" if problem.part else "")
    if blocked:
        return short + _skipped(record, rows, builders, "cannot be put together", f"the {blocked}")
    try:
        found = _reconciled(record, [one.layouts for one in arranged], builders)
    except ComparisonError as error:
        return short + _skipped(record, rows, builders, str(error))
    for builder, mine, layouts in zip(builders, rows, found, strict=True):
        for coordinates, layout in layouts.items():
            builder.add(mine, layout, coordinates, None)
    return short


def _drop_passed_on(
    record: RecordKey, arranged: list[Arranged], rows: tuple[list[_Row], list[_Row]], builders: Sequence[_Builder]
) -> list[Short]:
    """Keep what goes into the first and comes out of the last pipeline stage, where the other side has no stages.

    What stages pass on to each other has the names of the model's own inputs and outputs.
    """
    dropped = []
    for at, (builder, one) in enumerate(zip(builders, list(arranged), strict=True)):
        stages = list(one.layouts)
        of_model = any(row["of_model"] for row in rows[at]) and len(arranged[1 - at].layouts) == 1
        if len(stages) < 2 or not of_model or not all(_STAGE.fullmatch(stage) for stage in stages):
            continue
        if collapse(one.layouts) is not None:  # every stage is given the same
            continue
        own = stages[-1 if record.name.partition(".")[0] == "output" else 0]
        count = sum(one.layouts[stage].records for stage in stages if stage != own)
        reason = f"it is passed on between pipeline stages; the model's is that of {own}"
        dropped.append(Short(builder.label, "skipped", record, count, reason, excuse="passed on between stages"))
        arranged[at] = replace(one, layouts={"": one.layouts[own]})
    return dropped


def _reconciled(
    record: RecordKey, found: Sequence[Mapping[str, Layout]], builders: Sequence[_Builder]
) -> list[Mapping[str, Layout]]:
    """Bring both sides to the same places.

    Raises:
        ComparisonError: several places of one side hold different values, and nothing says how they make one tensor.
    """
    if not found[0] or not found[1] or found[0].keys() == found[1].keys():
        return list(found)
    reconciled: list[Mapping[str, Layout]] = []
    for builder, layouts in zip(builders, found, strict=True):
        one = next(iter(layouts.values())) if len(layouts) == 1 else collapse(layouts)
        if one is None:
            dims = next(iter(layouts.values())).dims
            said = f"the dims {str(dims)!r} do not say" if dims is not None else "no dims say"
            raise ComparisonError(
                f"the {builder.label} holds different values at {', '.join(layouts)}, and {said} how they make one "
                f"tensor; say it with dims=({record.tensor + ': ...'!r},), such as 'b[dp] s h[tp]' or '... # dp:mean'"
            )
        reconciled.append({"": one})
    return reconciled


def _skipped(
    record: RecordKey,
    rows: tuple[list[_Row], list[_Row]],
    builders: tuple[_Builder, ...],
    reason: str,
    group: str = "",
) -> list[Short]:
    """Both sides of a tensor that cannot be compared."""
    return [
        Short(builder.label, "skipped", record, len(mine), reason, group=group)
        for builder, mine in zip(builders, rows, strict=True)
        if mine
    ]


def _silent(side: Side, frame: pl.DataFrame) -> Iterator[Short]:
    """Ranks that should have written, and did not."""
    for rank in silent_ranks(frame.filter(~pl.col("by_row")), side.manifest):
        reason = f"rank {rank} wrote no record, and the plan names it"
        yield Short(side.label, "missing", RecordKey(name=f"rank {rank}"), 1, reason)


def _laid_out(frames: Sequence[pl.DataFrame]) -> bool:
    """Whether any record has dims or lies on another rank than those of the other side."""
    records = [frame.filter(~pl.col("by_row")) for frame in frames]
    if any(frame["dims"].is_not_null().any() for frame in records):
        return True
    ranks = [frame["rank"].unique().sort() for frame in records]
    return not (len(ranks[0]) <= 1 and ranks[0].equals(ranks[1], null_equal=True))


def _special(frames: Sequence[pl.DataFrame], spoken: Spoken) -> pl.DataFrame:
    """Identities whose records need arranging: parallel axes, other ranks or other dims on the two sides."""
    parallel = pl.col("dims").is_in(spoken.parallel()).fill_null(False)
    found = [
        frame.filter(~pl.col("by_row"))
        .group_by(LOGICAL)
        .agg(
            parallel=parallel.any(),
            ranks=pl.col("rank").unique().sort(),
            spoken=pl.col("dims").drop_nulls().unique().sort(),
        )
        for frame in frames
    ]
    both = found[0].join(found[1], on=list(LOGICAL), how="full", nulls_equal=True, coalesce=True, suffix="_c")
    cuts = pl.col("parallel").fill_null(False) | pl.col("parallel_c").fill_null(False)
    other_ranks = (pl.col("ranks") != pl.col("ranks_c")).fill_null(False)
    said = (pl.col("spoken").list.len() > 0) & (pl.col("spoken_c").list.len() > 0)
    other_dims = (said & (pl.col("spoken") != pl.col("spoken_c"))).fill_null(False)
    return both.filter(cuts | other_ranks | other_dims).select(LOGICAL)


def _grouped(frame: pl.DataFrame) -> _Group:
    found: _Group = {}
    for row in frame.iter_rows(named=True):
        found.setdefault(tuple(row[name] for name in LOGICAL), []).append(row)
    return found


def _ranks(rows: Sequence[_Row]) -> list[int]:
    return sorted(row["rank"] or 0 for row in rows)


def _key(key: tuple[Any, ...], rows: Sequence[_Row]) -> RecordKey:
    values = {name: value for name, value in zip(LOGICAL, key, strict=True) if name not in ("by_row", "layer")}
    return RecordKey(layer=rows[0]["layer_recorded"], **values)


def _sequence_records(frame: pl.DataFrame) -> dict[tuple[str, int], list[_Row]]:
    """Records of cumulative sequence lengths by phase and step, the padded ones first."""
    leaf = pl.col("name").str.split(".").list.last()
    found: dict[tuple[str, int], list[_Row]] = {}
    for row in frame.filter(~pl.col("by_row") & leaf.is_in(SEQUENCES)).iter_rows(named=True):
        found.setdefault((row["phase"], row["step"]), []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: SEQUENCES.index(row["name"].rpartition(".")[2]))
    return found
