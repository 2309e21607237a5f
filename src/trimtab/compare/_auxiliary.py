"""Records that say how the tokens of others are laid out: ids, attention masks, sequence lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from trimtab.compare._sides import Side
from trimtab.compare.dims import parse_dims
from trimtab.compare.layout import Layout, Piece, TokenMatch, needs_tokens
from trimtab.compare.layout.axes import is_dispatched, is_packed
from trimtab.compare.layout.tokens import IDS as ROUTED_IDS
from trimtab.errors import InputError
from trimtab.results.comparison import RecordKey

SEQUENCES = ("cu_seqlens_q_padded", "cu_seqlens_padded", "cu_seqlens_q", "cu_seqlens")
IDS, MASK = "input_ids", "attention_mask"
ALIGNING = (*SEQUENCES, "cu_seqlens_kv", "cu_seqlens_kv_padded", MASK, "position_ids", "positions", "qkv_format")
_Place = tuple[str, int, int, str]


class Auxiliary:
    """Finds them on both sides; reads nothing before it is asked."""

    def __init__(self, sides: tuple[Side, Side]) -> None:
        self._sides = sides
        self._found: list[dict[_Place, dict[str, Layout]]] | None = None
        self._routed: list[dict[tuple[str, int, int, int | None], dict[tuple[str, int], Layout]]] | None = None

    def tokens(self, key: RecordKey, ours: Layout, theirs: Layout) -> TokenMatch | None:
        """Where the ids are by which two layouts are aligned; None where that is not needed or they are missing."""
        if ours.axes is None or theirs.axes is None:
            return None
        if is_dispatched(ours.axes) or is_dispatched(theirs.axes):
            return self._dispatched(key)
        if not needs_tokens(ours.axes, theirs.axes):
            return None
        if self._found is None:
            self._found = [_collect(side) for side in self._sides]
        place = (key.phase, key.step, key.micro_step, key.coordinates)
        here = [found.get(place) or found.get((*place[:3], "")) or {} for found in self._found]
        if not all(IDS in one for one in here):
            return None
        packed = 0 if is_packed(ours.axes) else 1
        bounds = next((here[packed][name] for name in SEQUENCES if name in here[packed]), None)
        return TokenMatch(
            ids=(here[0][IDS], here[1][IDS]),
            mask=here[1 - packed].get(MASK),
            sequences=bounds.pieces[0].record_id if bounds is not None else None,
        )

    def _dispatched(self, key: RecordKey) -> TokenMatch | None:
        """Where the ids of the rows of one layer are, those of the same call where there are several."""
        if self._routed is None:
            self._routed = [_collect_routed(side) for side in self._sides]
        place = (key.phase, key.step, key.micro_step, key.layer)
        here = [found.get(place) or found.get((*place[:3], None)) for found in self._routed]
        if here[0] is None or here[1] is None:
            return None
        ids = [found.get((key.coordinates, key.call_index)) or next(iter(found.values())) for found in here if found]
        return TokenMatch(ids=(ids[0], ids[1]), mask=None, sequences=None)


def _collect_routed(side: Side) -> dict[tuple[str, int, int, int | None], dict[tuple[str, int], Layout]]:
    leaf = pl.col("name").str.split(".").list.last()
    found: dict[tuple[str, int, int, int | None], dict[tuple[str, int], Layout]] = {}
    for row in side.units.filter(~pl.col("by_row") & (leaf == ROUTED_IDS)).iter_rows(named=True):
        place = (row["phase"], row["step"], row["micro_step"], row["layer_recorded"])
        layout = side.layouts[row["layout"]] if row["layout"] is not None else _single(row)
        found.setdefault(place, {})[row["coordinates"], row["call_index"]] = layout
    return found


def _collect(side: Side) -> dict[_Place, dict[str, Layout]]:
    names = (*SEQUENCES, IDS, MASK)
    leaf = pl.col("name").str.split(".").list.last()
    found: dict[_Place, dict[str, Layout]] = {}
    for row in side.units.filter(~pl.col("by_row") & leaf.is_in(names)).iter_rows(named=True):
        place = (row["phase"], row["step"], row["micro_step"], row["coordinates"])
        layout = side.layouts[row["layout"]] if row["layout"] is not None else _single(row)
        found.setdefault(place, {}).setdefault(row["name"].rpartition(".")[2], layout)
    return found


def _single(row: Mapping[str, Any]) -> Layout:
    try:
        dims = parse_dims(row["dims"]) if row["dims"] is not None else None
    except InputError:
        dims = None
    piece = Piece(row["ids"][0], row["rank"] or 0, (), tuple(row["shape"] or ()), row["digests"][0], row["stored"])
    return Layout(dims, (piece,))
