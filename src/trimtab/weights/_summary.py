"""The report of a run, read off its layers one at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl

from trimtab.results.weights import (
    DirectionProfile,
    FocusLayer,
    GroupTest,
    HeadChange,
    Interaction,
    LayerProfile,
    MatrixChange,
    NormChange,
    RankedChange,
    RankedComponent,
    WeightsAnalysis,
    WeightsControls,
    WeightsDirection,
    WeightsGrid,
)
from trimtab.weights._means import Key, whole_measures
from trimtab.weights._measures import FOCUS, describe
from trimtab.weights._over_layers import as_interaction, component_interactions, direction_profiles
from trimtab.weights._run import Settings
from trimtab.weights._store import Store, layers_of
from trimtab.weights.pair import Pair
from trimtab.weights.statistics import Array, beyond, compare_groups, control_false_discoveries, peak, rank_components

TOP = 20
"""Rows kept of every measure and part, and interactions at either end."""
_QUANTITIES = ("base", "tuned", "delta", "z")


@dataclass
class _Collected:
    """What is gathered while the layers go by."""

    own: list[int]
    reference: list[int]
    grids: dict[Key, dict[str, dict[int, Array]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    controls: dict[Key, dict[int, Array]] = field(default_factory=lambda: defaultdict(dict))
    ranked: list[pl.DataFrame] = field(default_factory=list)
    heads: list[HeadChange] = field(default_factory=list)
    pairs: list[pl.DataFrame] = field(default_factory=list)
    count: int = 0
    largest: float = 0.0


def summarise(settings: Settings, store: Store, models: Pair) -> WeightsAnalysis:
    """Read every layer once and return the report."""
    names = settings.directions
    found = _Collected(
        own=[place for place, one in enumerate(names) if one.kind != "control"], reference=settings.reference
    )
    for layer, rows in layers_of(store):
        _add(found, layer, rows)
    average = store.averages()
    if average is not None:
        _add_rows(found, average)
    kinds = [names.about[place].kind for place in found.own]
    tests = control_false_discoveries(list(_tests(found, kinds, settings.layers)))
    components, correlations = _components(found, settings)
    focus = tuple(_focus(found, settings))
    matrices = [store.matrices(layer) for layer in settings.layers]
    keys = [key for key in found.grids if _shown(key)]
    return WeightsAnalysis(
        analysis=settings.analysis,
        path="" if store.directory is None else str(store.directory),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=models.base.name,
        tuned=models.tuned.name,
        family=models.family,
        num_layers=models.num_layers,
        hidden_size=models.hidden_size,
        num_heads=models.base.sizes.heads,
        layers=settings.layers,
        dtype=settings.dtype,
        seed=settings.seed,
        offset=settings.offset,
        identical=found.largest == 0,
        directions=tuple(_direction(names.about[place]) for place in found.own),
        controls=_controls(settings),
        measures=tuple(describe(part, measure) for part, measure in dict.fromkeys(key[:2] for key in found.grids)),
        focus=focus,
        rankings=_rankings(found),
        profiles=tuple(_profiles(found, keys, kinds)),
        grids=tuple(_grids(found, keys, settings.layers)),
        tests=tests,
        interactions=_interactions(found),
        profiles_of_directions=tuple(_of_directions(found, settings)),
        component_interactions=tuple(component_interactions(settings, store, focus)),
        heads=tuple(sorted(found.heads, key=lambda one: -abs(one.z))),
        components=components,
        variance_against_effect=correlations,
        matrices=tuple(_of(MatrixChange, row) for rows, _ in matrices for row in rows),
        norms=tuple(_of(NormChange, row) for _, rows in matrices for row in rows),
        num_measurements=found.count,
        notes=(*models.notes, *_notes(settings, found)),
    )


def _add(found: _Collected, layer: int, rows: pl.DataFrame) -> None:
    for key, frame in whole_measures(rows).items():
        for quantity in _QUANTITIES:
            if frame[quantity].null_count() == 0:
                values = frame[quantity].to_numpy()
                found.grids[key][quantity][layer] = values[found.own]
                if quantity == "delta":
                    found.controls[key][layer] = values[found.reference]
    _add_rows(found, rows)
    own = rows.filter(pl.col("head").is_not_null() & (pl.col("kind") != "control") & (pl.col("sign") == 1))
    for (part, head), frame in own.partition_by("part", "head", as_dict=True, maintain_order=True).items():
        scores = frame["z"].abs().to_numpy()
        best = frame.row(int(np.nan_to_num(scores, nan=-1.0).argmax()), named=True)
        finite = scores[np.isfinite(scores)]
        found.heads.append(
            HeadChange(
                part=str(part),
                layer=layer,
                head=int(head),
                mean_abs_z=float(finite.mean()) if len(finite) else 0.0,
                direction=best["direction"],
                kind=best["kind"],
                z=best["z"],
            )
        )


def _add_rows(found: _Collected, rows: pl.DataFrame) -> None:
    found.count += len(rows)
    size = rows["delta"].abs().max()
    found.largest = max(found.largest, float(size) if isinstance(size, (int, float)) else 0.0)
    own = rows.filter(pl.col("kind") != "control").with_columns(size=pl.col("z").abs())
    # Without biases attention answers the opposite with the opposite, which would be listed twice.
    seen = (pl.col("sign") == 1) | (pl.col("part") == "mlp")
    single = own.filter(pl.col("other").is_null() & seen)
    found.ranked.append(
        single.sort("size", descending=True, maintain_order=True)
        .group_by("part", "measure", pl.col("head").is_null().alias("whole"), maintain_order=True)
        .head(TOP)
    )
    pairs = own.filter(pl.col("other").is_not_null()).sort("z", maintain_order=True)
    for side in (pairs.group_by("part", maintain_order=True).head(TOP), pairs.group_by("part").tail(TOP)):
        found.pairs.append(side)


def _rankings(found: _Collected) -> tuple[RankedChange, ...]:
    if not found.ranked:
        return ()
    every = pl.concat(found.ranked, how="diagonal").sort("size", descending=True, maintain_order=True)
    kept = every.group_by("part", "measure", pl.col("layer").is_null().alias("mean"), "whole", maintain_order=True)
    best = kept.head(TOP).sort("size", descending=True, maintain_order=True)
    return tuple(
        RankedChange(
            rank=place + 1,
            **{
                name: row[name]
                for name in ("measure", "part", "layer", "head", "sign", "direction", "kind", "base", "tuned", "delta",
                             "z", "z_error")
            },
        )
        for place, row in enumerate(best.iter_rows(named=True))
    )  # fmt: skip


def _interactions(found: _Collected) -> tuple[Interaction, ...]:
    """The most positive and the most negative of every part, over the layers and in their mean, by z."""
    if not found.pairs:
        return ()
    every = pl.concat(found.pairs).unique(maintain_order=True).sort("z", maintain_order=True)
    groups = every.group_by("part", pl.col("layer").is_null().alias("mean"), maintain_order=True)
    both = pl.concat([groups.head(TOP), groups.tail(TOP)], how="diagonal").unique(maintain_order=True)
    return tuple(map(as_interaction, both.sort("z", descending=True, maintain_order=True).iter_rows(named=True)))


def _profiles(found: _Collected, keys: Iterable[Key], kinds: list[Any]) -> Iterable[LayerProfile]:
    listed = np.asarray(kinds)
    groups = {"all": np.ones(len(kinds), dtype=bool), **{kind: listed == kind for kind in dict.fromkeys(kinds)}}
    for key in keys:
        grid = found.grids[key]
        for layer, delta in grid["delta"].items():
            controls = found.controls[key][layer]
            for kind, chosen in groups.items():
                if kind != "all" and len(groups) == 2:
                    continue  # one kind only: it is all of them
                values = delta[chosen]
                scores = np.abs(grid["z"][layer][chosen])
                finite = scores[np.isfinite(scores)]
                yield LayerProfile(
                    measure=key[1],
                    part=key[0],
                    sign=key[2],
                    layer=layer,
                    kind=kind,
                    count=int(chosen.sum()),
                    mean=float(values.mean()),
                    std=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
                    mean_base=float(grid["base"][layer][chosen].mean()) if "base" in grid else None,
                    mean_tuned=float(grid["tuned"][layer][chosen].mean()) if "tuned" in grid else None,
                    mean_abs_z=float(finite.mean()) if len(finite) else 0.0,
                    control_mean=float(controls.mean()),
                    control_std=float(controls.std(ddof=1)),
                )


def _of_directions(found: _Collected, settings: Settings) -> Iterable[DirectionProfile]:
    own = [settings.directions.about[place] for place in found.own]
    listed = FOCUS[settings.analysis]
    beside = dict.fromkeys((part, "excess") for part, _ in listed)
    return direction_profiles(found.grids, own, [*listed, *beside])


def _focus(found: _Collected, settings: Settings) -> Iterable[FocusLayer]:
    """Find the layer where each focus measure changed most beyond what controls changed."""
    own = [settings.directions.about[place] for place in found.own]
    for part, measure in FOCUS[settings.analysis]:
        grid = found.grids.get((part, measure, 1))
        if grid is None:
            continue
        layers = list(grid["delta"])
        means = {layer: float(np.abs(grid["delta"][layer]).mean()) for layer in layers}
        chance = {layer: float(np.abs(found.controls[part, measure, 1][layer]).mean()) for layer in layers}
        excess = [
            beyond(np.abs(grid["delta"][layer]), np.abs(found.controls[part, measure, 1][layer])) for layer in layers
        ]
        if max(excess) == 0:  # directions changed no more than controls: where all changed most
            excess = list(means.values())
        layer, _ = peak(excess, layers)
        others = [place for place, one in enumerate(layers) if one != layer]
        following = peak([excess[place] for place in others], [layers[place] for place in others]) if others else None
        scores = found.grids.get((part, "excess", 1), grid)["z"][layer]
        order = np.argsort(-np.nan_to_num(scores if "base" not in grid else np.abs(scores), nan=-np.inf), kind="stable")
        yield FocusLayer(
            measure=measure,
            part=part,
            layer=layer,
            value=means[layer],
            control_value=chance[layer],
            next_layer=None if following is None else following[0],
            top=tuple(own[place].label for place in order[:10]),
        )


def _tests(found: _Collected, kinds: list[Any], layers: tuple[int, ...]) -> Iterable[GroupTest]:
    """Roles against traits, for every whole measure: at each layer and over the layers."""
    for (part, measure, sign), grid in found.grids.items():
        if sign != 1 or not _shown((part, measure, sign)):
            continue
        for layer, values in grid["delta"].items():
            one = compare_groups(values, kinds, measure=measure, part=part, layer=layer)
            if one is not None:
                yield one
        mean = np.mean(list(grid["delta"].values()), axis=0)
        one = compare_groups(mean, kinds, measure=measure, part=part)
        if one is not None and len(layers) > 1:
            yield one


def _components(
    found: _Collected, settings: Settings
) -> tuple[tuple[RankedComponent, ...], tuple[tuple[str, str, float], ...]]:
    """Set the effect of every principal component beside its variance, for the focus measures."""
    own = [settings.directions.about[place] for place in found.own]
    places = [place for place, one in enumerate(own) if one.kind == "pc"]
    rows: list[RankedComponent] = []
    correlations = []
    for part, measure in FOCUS[settings.analysis]:
        grid = found.grids.get((part, measure, 1))
        if grid is None or not places:
            continue
        scores = np.mean([np.abs(values[places]) for values in grid["z"].values()], axis=0)
        numbers = [own[place].number or place + 1 for place in places]
        variances = [own[place].variance for place in places]
        ranked, correlation = rank_components(numbers, variances, scores.tolist(), measure=measure, part=part)
        rows += ranked
        correlations.append((measure, part, correlation))
    return tuple(rows), tuple(correlations)


def _grids(found: _Collected, keys: Iterable[Key], layers: tuple[int, ...]) -> Iterable[WeightsGrid]:
    for part, measure, sign in keys:
        for quantity, by_layer in found.grids[part, measure, sign].items():
            columns = [by_layer.get(layer) for layer in layers]
            yield WeightsGrid(
                measure=measure,
                part=part,
                sign=sign,
                quantity=quantity,
                values=tuple(
                    tuple(math.nan if one is None else _short(one[row]) for one in columns)
                    for row in range(len(found.own))
                ),
            )


def _shown(key: Key) -> bool:
    """Single experts are ranked, but have no figures of their own."""
    return not key[0].startswith("experts.")


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _direction(one: Any) -> WeightsDirection:
    return WeightsDirection(
        **{name: getattr(one, name) for name in ("name", "kind", "source", "norm", "layer", "number", "variance")}
    )


def _controls(settings: Settings) -> tuple[WeightsControls, ...]:
    made = [one for one in settings.directions if one.control is not None]
    return tuple(
        WeightsControls(
            kind=str(kind),
            count=sum(one.control == kind for one in made),
            source=next(one.source for one in made if one.control == kind),
            compared_with=kind == settings.compared_with,
        )
        for kind in dict.fromkeys(one.control for one in made)
    )


def _notes(settings: Settings, found: _Collected) -> Iterable[str]:
    count = len(found.reference)
    yield f"a z-score's own error from {count} controls is about {100 / math.sqrt(2 * (count - 1)):.0f} % of it"
    held = {layer for grid in found.grids.values() for layer in grid["delta"]}
    without = [layer for layer in settings.layers if layer not in held]
    if without:
        yield f"layers {', '.join(map(str, without))} mix tokens without softmax attention and were not measured"
    if any(not _shown(key) for key in found.grids):
        yield "single experts are ranked and are in the Parquet files; figures show the other matrices"


def _of(kind: Any, row: dict[str, Any]) -> Any:
    values = {name: _number(value) for name, value in row.items()}
    return kind(**values)


def _number(value: Any) -> Any:
    """Read a number of our JSON, where "inf" stands for infinity."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    return tuple(value) if isinstance(value, list) else value
