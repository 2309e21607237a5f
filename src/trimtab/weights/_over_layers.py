"""Directions over the layers, and what principal components came to do to other directions at the focus layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl
import torch

from trimtab.numerics.dtypes import resolve_dtype
from trimtab.results.weights import DirectionProfile, FocusLayer, Interaction
from trimtab.weights._means import Key, mean_cross
from trimtab.weights._rows import Cross, pair_rows
from trimtab.weights._run import Settings
from trimtab.weights._store import Store
from trimtab.weights.directions import Named
from trimtab.weights.statistics import Array

MOST = 50
COMPONENTS, EITHER_END = 10, 3
Grids = Mapping[Key, Mapping[str, Mapping[int, Array]]]
"""(part, measure, sign) -> quantity -> layer -> one number a direction."""


def direction_profiles(
    grids: Grids, own: Sequence[Named], measures: Iterable[tuple[str, str]]
) -> Iterable[DirectionProfile]:
    """Rank the directions of some (part, measure) by their mean z over the layers, with spread and peak."""
    for part, measure in measures:
        grid = grids.get((part, measure, 1))
        if grid is None:
            continue
        layers = list(grid["delta"])
        deltas = np.stack([grid["delta"][layer] for layer in layers])
        scores = np.nan_to_num(np.stack([grid["z"][layer] for layer in layers]), nan=0.0)
        sizes = np.abs(scores) if "base" in grid else scores
        means, peaks = sizes.mean(axis=0), sizes.argmax(axis=0)
        for place, row in enumerate(np.argsort(-means, kind="stable")[:MOST]):
            yield DirectionProfile(
                rank=place + 1,
                measure=measure,
                part=part,
                direction=own[row].name,
                kind=own[row].kind,
                mean=float(deltas[:, row].mean()),
                std=float(deltas[:, row].std(ddof=1)) if len(layers) > 1 else 0.0,
                mean_z=float(means[row]),
                peak_layer=layers[peaks[row]],
                peak=float(deltas[peaks[row], row]),
                peak_z=float(scores[peaks[row], row]),
            )


def every_pair(settings: Settings, store: Store, part: str, layer: int | None) -> pl.DataFrame | None:
    """Return all pairs of different directions at one layer (None: in the mean over layers); None: there are none."""
    cross: Cross | None
    if layer is not None:
        cross = store.crosses(layer).get(part)
    else:
        held = [store.crosses(one).get(part) for one in settings.layers]
        cross = mean_cross(part, held) if any(held) else None
    if cross is None:
        return None
    unit = float(torch.finfo(resolve_dtype(settings.dtype)).eps) / 2
    return pair_rows(layer, cross, settings.directions, settings.reference, unit, None)


def component_interactions(settings: Settings, store: Store, focus: Sequence[FocusLayer]) -> Iterable[Interaction]:
    """Yield what each leading component was most strengthened and most weakened with, at the first focus layer."""
    named = [one for one in settings.directions if one.kind == "pc"][:COMPONENTS]
    layers = {one.part: one.layer for one in reversed(focus)}
    for part, layer in layers.items() if named else ():
        rows = every_pair(settings, store, part, layer)
        if rows is None:
            continue
        for one in named:
            for name, kind in (("direction", "kind"), ("other", "other_kind")):
                of = rows.filter((pl.col(name) == one.name) & (pl.col(kind) == "pc")).sort("z", descending=True)
                kept = of if len(of) <= 2 * EITHER_END else pl.concat([of.head(EITHER_END), of.tail(EITHER_END)])
                yield from map(as_interaction, kept.iter_rows(named=True))


def as_interaction(row: Mapping[str, object]) -> Interaction:
    """Return a row of a pair as it stands in the report."""
    names = {"first": "direction", "first_kind": "kind", "second": "other", "second_kind": "other_kind"}
    same = ("part", "layer", "base", "tuned", "delta", "z", "z_error")
    found = {**{to: row[name] for to, name in names.items()}, **{name: row[name] for name in same}}
    return Interaction(**found)  # type: ignore[arg-type]
