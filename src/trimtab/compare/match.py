"""Pair the units of two sides: records by identity, rows by position, up to where the tokens diverge."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from trimtab.compare._absent import Absent, grouped, spans
from trimtab.compare._auxiliary import ALIGNING, Auxiliary
from trimtab.compare._short import Short
from trimtab.compare._sides import KEY, Ints, Side, TokenKey, Tokens
from trimtab.compare.layout import Layout, TokenMatch
from trimtab.errors import ComparisonError
from trimtab.results._lazy import LazySequence
from trimtab.results.comparison import RecordKey, TokenDivergence

_CARRIED = ("layer_recorded", "first_order", "ids", "digests", "positions", "stored", "layout", "records")


class Segment(NamedTuple):
    """Rows of one record on each side, in step."""

    reference_id: int
    candidate_id: int
    reference_rows: Ints
    candidate_rows: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two units that match, and how to lay them side by side."""

    key: RecordKey
    order: int
    reference_ids: tuple[int, ...]
    candidate_ids: tuple[int, ...]
    same_digest: bool
    """Every record of one side has the digest and the rows of one on the other: identical without reading."""
    stored: bool
    """Whether both sides kept values; statistics and digests alone cannot show how large a difference is."""
    segments: tuple[Segment, ...] = ()
    positions: Ints | None = None
    """Absolute positions of the compared rows; None for records compared whole."""
    layouts: tuple[Layout, Layout] | None = None
    """How both sides are made of records, where they are not one record each in one order of axes."""
    tokens: TokenMatch | None = None
    """Where the token ids are, by which packed and padded tokens are laid side by side."""
    counts: tuple[int, int] = (1, 1)
    """Records of both sides, copies counted."""
    ranks: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """The ranks that hold them, where the key does not say."""

    @property
    def items(self) -> tuple[int, int]:
        """What the ledger counts on each side: rows, or records."""
        return self.counts if self.positions is None else (len(self.positions), len(self.positions))


@dataclass(frozen=True, slots=True)
class Matched:
    """All pairs and everything that stays without a partner."""

    pairs: LazySequence[Pair]
    """In the reference's order; whole records of equal digest are rows of a table, all others are `single`."""
    short: tuple[Short, ...]
    tokens: tuple[TokenDivergence, ...]
    warnings: tuple[str, ...]


def match(reference: Side, candidate: Side) -> Matched:
    """Pair up two sides.

    Raises:
        ComparisonError: the prompts of the two runs differ.
    """
    divergences = _token_divergences(reference, candidate)
    limits = {(one.config, one.prompt, one.request): one.position for one in divergences}
    units = [side.units.select(*KEY, *_CARRIED) for side in (reference, candidate)]
    joined = units[0].join(units[1], on=list(KEY), how="full", nulls_equal=True, coalesce=True, suffix="_c")
    joined = joined.sort("first_order", "first_order_c", nulls_last=True, maintain_order=True)
    same = _same_whole(joined)
    pairs: list[Pair] = []
    places: list[int] = []  # of each pair, in `joined`
    short: list[Short] = []
    sides = (reference, candidate)
    auxiliary, absent = Auxiliary(sides), Absent(sides)
    for row in _rows(joined.with_row_index("place").filter(~same)):
        key, before = _key(row), len(pairs)
        if row["ids"] is None or row["ids_c"] is None:
            short.append(_lonely(key, row, "reference" if row["ids_c"] is None else "candidate", absent))
        elif row["by_row"]:
            limit = limits.get((key.config, key.prompt or 0, str(key.request)))
            _match_rows(key, row, limit, sides, pairs, short)
        elif row["layout"] is None or row["layout_c"] is None:
            pairs.append(_match_whole(key, row))
        else:
            pairs.append(_match_layouts(key, row, sides, auxiliary))
        places += [row["place"]] * (len(pairs) - before)
    if any(pair.tokens is not None for pair in pairs):
        short = [_excused(one) for one in short]
    short = grouped(short)
    return Matched(_in_order(joined, same, pairs, places), tuple(short), divergences, _warnings(sides, joined, absent))


def _same_whole(joined: pl.DataFrame) -> pl.Series:
    """Which rows are two whole records of equal digest: nothing is left to find out about them."""
    digest, digest_c = (pl.col(name).list.first() for name in ("digests", "digests_c"))
    plain = pl.col("layout").is_null() | pl.col("layout_c").is_null()
    found = pl.col("by_row").not_() & plain & (digest == digest_c)
    return joined.select(found.fill_null(False)).to_series()


def _in_order(joined: pl.DataFrame, same: pl.Series, pairs: list[Pair], places: list[int]) -> LazySequence[Pair]:
    """Put the pairs between those that stay rows of a table."""
    table = joined.filter(same).select(
        pl.coalesce("layer_recorded", "layer_recorded_c").alias("layer"),
        *(name for name in KEY if name not in ("by_row", "layer")),
        pl.col("first_order").alias("order"),
        reference_id=pl.col("ids").list.first(),
        candidate_id=pl.col("ids_c").list.first(),
        both_stored=pl.col("stored") & pl.col("stored_c"),
    )
    where = np.concatenate([np.flatnonzero(same.to_numpy()), np.asarray(places, dtype=np.int64)])
    order = np.concatenate([np.arange(table.height), ~np.arange(len(pairs))])[np.argsort(where, kind="stable")]
    return LazySequence(pairs, table=table, build=_pair_of, order=order.tolist())


def _pair_of(row: Mapping[str, Any]) -> Pair:
    """The pair of a row of the table."""
    return Pair(
        key=key_of(row),
        order=row["order"],
        reference_ids=(row["reference_id"],),
        candidate_ids=(row["candidate_id"],),
        same_digest=True,
        stored=row["both_stored"],
    )


_NAMES = tuple(one.name for one in dataclasses.fields(RecordKey))


def key_of(row: Mapping[str, Any]) -> RecordKey:
    """The identity in a row of the table of pairs."""
    return RecordKey(**{name: row[name] for name in _NAMES})


def _rows(frame: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """The rows as dicts; columns are converted whole, which for lists is much faster than row by row."""
    columns = {name: frame[name].to_list() for name in frame.columns}
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _key(row: dict[str, Any]) -> RecordKey:
    layer = row["layer_recorded"] if row["layer_recorded"] is not None else row["layer_recorded_c"]
    values = {name: row[name] for name in KEY if name not in ("by_row", "layer")}
    return RecordKey(layer=layer, **values)


def token_group(key: RecordKey) -> str:
    """Name under which the ledger puts what lies behind the place where a request's tokens diverge."""
    return f"tokens prompt={key.prompt} request={key.request}" + (f" config={key.config}" if key.config else "")


def _lonely(key: RecordKey, row: dict[str, Any], side: str, absent: Absent) -> Short:
    suffix, other = ("", "candidate") if side == "reference" else ("_c", "reference")
    count = len(set().union(*row[f"positions{suffix}"])) if row["by_row"] else row[f"records{suffix}"]
    short = Short(side, "unmatched", key, count, f"the {other} has no such record")
    return short if row["by_row"] else absent.explained(short)


def _match_whole(key: RecordKey, row: dict[str, Any]) -> Pair:
    return Pair(
        key=key,
        order=row["first_order"],
        reference_ids=tuple(row["ids"]),
        candidate_ids=tuple(row["ids_c"]),
        same_digest=False,
        stored=row["stored"] and row["stored_c"],
    )


def _match_layouts(key: RecordKey, row: dict[str, Any], sides: tuple[Side, Side], auxiliary: Auxiliary) -> Pair:
    """Pair two tensors made of pieces; where both are one record with one order of axes, as plain records."""
    ours, theirs = sides[0].layouts[row["layout"]], sides[1].layouts[row["layout_c"]]
    dispatched = any(side.dims is not None and side.dims.dispatched for side in (ours, theirs))
    plain = len(ours.pieces) == len(theirs.pieces) == 1 and ours.in_order_of(theirs) and not dispatched
    return Pair(
        key=key,
        order=row["first_order"],
        reference_ids=ours.ids,
        candidate_ids=theirs.ids,
        same_digest=ours.same_as(theirs),
        stored=row["stored"] and row["stored_c"],
        layouts=None if plain else (ours, theirs),
        tokens=auxiliary.tokens(key, ours, theirs),
        counts=(ours.records, theirs.records),
        ranks=(ours.ranks, theirs.ranks),
    )


def _excused(short: Short) -> Short:
    """What says how tokens are laid out need not be on the side that lays them out otherwise."""
    if short.kind != "unmatched" or short.key.tensor.rpartition(".")[2] not in ALIGNING:
        return short
    return dataclasses.replace(short, excuse="tokens are aligned by ids")


def _match_rows(
    key: RecordKey,
    row: dict[str, Any],
    limit: int | None,
    sides: tuple[Side, Side],
    pairs: list[Pair],
    short: list[Short],
) -> None:
    """Match rows by position, below `limit` (the first position whose token differs)."""
    ours, theirs = _Rows.gather(row, ""), _Rows.gather(row, "_c")
    for side, rows, ids in ((sides[0], ours, row["ids"]), (sides[1], theirs, row["ids_c"])):
        twice = rows.contradictions(side, ids)
        if twice:
            reason = f"position {twice[0]} is recorded more than once, with different values"
            short.append(Short(side.label, "skipped", key, len(twice), reason))
    same = np.array_equal(ours.positions, theirs.positions)
    if same:
        common, at, at_c = ours.positions, np.arange(ours.positions.size), np.arange(ours.positions.size)
    else:
        common, at, at_c = np.intersect1d(ours.positions, theirs.positions, assume_unique=True, return_indices=True)
    where = token_group(key)
    for label, rows in (("reference", ours), ("candidate", theirs)):
        after = 0 if limit is None else int((rows.positions >= limit).sum())
        if after:
            reason = f"tokens diverge at position {limit}; later rows are not comparable"
            short.append(Short(label, "skipped", key, after, reason, group=where))
        alone = rows.positions[:0] if same else np.setdiff1d(rows.positions, common)
        alone = alone if limit is None else alone[alone < limit]
        if alone.size:
            other = "candidate" if label == "reference" else "reference"
            reason = f"the {other} has no row at position {spans(alone)}"
            short.append(Short(label, "unmatched", key, int(alone.size), reason))
    if limit is not None:
        keep = common < limit
        common, at, at_c = common[keep], at[keep], at_c[keep]
    if common.size == 0:
        return
    segments = tuple(_segments(row, ours, theirs, at, at_c))
    pairs.append(
        Pair(
            key=key,
            order=row["first_order"],
            reference_ids=tuple(row["ids"]),
            candidate_ids=tuple(row["ids_c"]),
            same_digest=limit is None and _same_digests(row),
            stored=row["stored"] and row["stored_c"],
            segments=segments,
            positions=common,
        )
    )


class _Rows(NamedTuple):
    """Rows of one unit by position: in which of its records each lies, and where there."""

    positions: Ints
    record: Ints
    row: Ints
    repeats: tuple[tuple[int, int, int], ...]
    """Position, record and row of every further row of a position; only the first is compared."""

    @classmethod
    def gather(cls, row: dict[str, Any], suffix: str) -> _Rows:
        cuts = [np.asarray(cut, dtype=np.int64) for cut in row[f"positions{suffix}"]]
        if len(cuts) == 1 and bool((cuts[0][1:] > cuts[0][:-1]).all()):
            return cls(cuts[0], np.zeros_like(cuts[0]), np.arange(len(cuts[0])), ())
        positions = np.concatenate(cuts)
        record = np.repeat(np.arange(len(cuts)), [len(cut) for cut in cuts])
        index = np.concatenate([np.arange(len(cut)) for cut in cuts])
        unique, first = np.unique(positions, return_index=True)
        rest = np.setdiff1d(np.arange(len(positions)), first)
        repeats = tuple((int(positions[one]), int(record[one]), int(index[one])) for one in rest)
        return cls(unique, record[first], index[first], repeats)

    def contradictions(self, side: Side, ids: list[int]) -> list[int]:
        """Positions that were recorded again with other bytes; equal rows count once."""
        found = []
        for position, record, row in self.repeats:
            at = int(np.searchsorted(self.positions, position))
            first = side.trace.tensor(ids[self.record[at]])[int(self.row[at])]
            again = side.trace.tensor(ids[record])[row]
            if first.dtype != again.dtype or not torch.equal(
                first.contiguous().view(-1).view(torch.uint8), again.contiguous().view(-1).view(torch.uint8)
            ):
                found.append(position)
        return found


def _segments(row: dict[str, Any], ours: _Rows, theirs: _Rows, at: Ints, at_c: Ints) -> Iterator[Segment]:
    """Cut the common rows wherever either side goes on in another record."""
    if len(row["ids"]) == 1 == len(row["ids_c"]):
        yield Segment(row["ids"][0], row["ids_c"][0], ours.row[at], theirs.row[at_c])
        return
    record, record_c = ours.record[at], theirs.record[at_c]
    cuts = np.flatnonzero((np.diff(record) != 0) | (np.diff(record_c) != 0)) + 1
    for part in np.split(np.arange(len(at)), cuts):
        yield Segment(
            row["ids"][record[part[0]]], row["ids_c"][record_c[part[0]]], ours.row[at[part]], theirs.row[at_c[part]]
        )


def _same_digests(row: dict[str, Any]) -> bool:
    if None in row["digests"] or None in row["digests_c"]:
        return False
    ours = sorted(zip(row["digests"], map(tuple, row["positions"]), strict=True))
    return ours == sorted(zip(row["digests_c"], map(tuple, row["positions_c"]), strict=True))


def _token_divergences(reference: Side, candidate: Side) -> tuple[TokenDivergence, ...]:
    """Where the tokens of each common request first differ.

    Raises:
        ComparisonError: they differ inside the prompt.
    """
    found = []
    for key in reference.tokens.keys() & candidate.tokens.keys():
        ours, theirs = reference.tokens[key], candidate.tokens[key]
        common, at, at_c = np.intersect1d(ours.positions, theirs.positions, return_indices=True)
        unequal = np.flatnonzero(ours.ids[at] != theirs.ids[at_c])
        if ours.prompt_length != theirs.prompt_length or (
            unequal.size and common[unequal[0]] < ours.positions[0] + ours.prompt_length
        ):
            raise ComparisonError(_prompt_message(key, ours, theirs, common, at, at_c, unequal))
        if unequal.size:
            first = unequal[0]
            found.append(
                TokenDivergence(
                    config=key[0],
                    prompt=key[1],
                    request=key[2],
                    position=int(common[first]),
                    reference_id=int(ours.ids[at[first]]),
                    candidate_id=int(theirs.ids[at_c[first]]),
                )
            )
    return tuple(sorted(found, key=lambda one: (one.config, one.prompt, one.request)))


def _prompt_message(
    key: TokenKey, ours: Tokens, theirs: Tokens, common: Ints, at: Ints, at_c: Ints, unequal: Ints
) -> str:
    start = f"prompt {key[1]} (request {key[2]}) is not the same in the two runs: "
    rest = "; compare runs of the same prompts"
    if ours.prompt_length != theirs.prompt_length:
        return f"{start}{ours.prompt_length} tokens in the reference, {theirs.prompt_length} in the candidate{rest}"
    first = unequal[0]
    ids = f"token {ours.ids[at[first]]} in the reference, {theirs.ids[at_c[first]]} in the candidate"
    return f"{start}at position {common[first]} {ids}{rest}"


def _warnings(sides: tuple[Side, Side], joined: pl.DataFrame, absent: Absent) -> tuple[str, ...]:
    warnings = [one for one in (absent.warning(),) if one is not None]
    if joined["by_row"].any():
        without = [side.label for side in sides if not side.tokens]
        if without:
            warnings.append(
                f"the {' and the '.join(without)} recorded no token ids: rows are matched by position alone"
            )
    repeats = joined.filter(pl.col("occurrence") > 0)
    if repeats.height:
        name = _key(repeats.row(0, named=True)).text
        warnings.append(f"{repeats.height} records share their identity with another; paired in order, such as {name}")
    return tuple(warnings)
