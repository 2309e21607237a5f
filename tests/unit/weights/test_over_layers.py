"""Directions over the layers, all pairs of one direction, and components both ways."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from tests.unit.weights.weights_pairs import directions, noisy, saved_pair
from trimtab.errors import InputError
from trimtab.weights import WeightsRun, measure_attention


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[WeightsRun, WeightsRun]:
    """The same measurement with few pairs kept and with all, which average the layers."""
    models = saved_pair(tmp_path_factory.mktemp("over"), noisy)
    few = measure_attention(*models, directions(), controls=16, pairs=2, out=models[0].parent / "run")
    return few, measure_attention(*models, directions(), controls=16, pairs=None, average_layers=True)


def test_profiles_are_means_spreads_and_peaks(runs: tuple[WeightsRun, WeightsRun]) -> None:
    run = runs[0]
    rows = run.frame().filter(pl.col("head").is_null() & pl.col("other").is_null() & (pl.col("sign") == 1))
    listed = run.report.profiles_of_directions
    assert {(one.part, one.measure) for one in listed} == {
        ("qk", "affinity"), ("vo", "change"), ("vo", "promotion"), ("vo", "excess"),
    }  # fmt: skip
    assert len(listed) == 4 * 24
    for one in listed:
        of = rows.filter(
            (pl.col("part") == one.part) & (pl.col("measure") == one.measure)
            & (pl.col("direction") == one.direction) & (pl.col("kind") == one.kind)
        )  # fmt: skip
        delta, z = of["delta"].to_numpy(), of["z"].to_numpy()
        assert (one.mean, one.std) == pytest.approx((delta.mean(), delta.std(ddof=1)))
        size = np.abs(z) if one.measure in ("affinity", "promotion") else z
        assert one.mean_z == pytest.approx(size.mean())
        place = int(size.argmax())
        assert (one.peak_layer, one.peak, one.peak_z) == (of["layer"][place], delta[place], z[place])
    best = [one for one in listed if one.measure == "excess"]
    assert [one.rank for one in best] == list(range(1, 25))
    assert [one.mean_z for one in best] == sorted((one.mean_z for one in best), reverse=True)


@pytest.mark.parametrize("part", ["qk", "vo"])
@pytest.mark.parametrize("layer", [1, None])
def test_all_pairs_of_a_direction_are_there_when_few_were_kept(
    part: str, layer: int | None, runs: tuple[WeightsRun, WeightsRun]
) -> None:
    few, every = runs
    found = few.interactions(part, layer, of="role d3")
    assert len(found) == 2 * 23 and found["z"].is_sorted(descending=True)
    kept = every.interactions(part, layer)
    where = ((pl.col("direction") == "d3") & (pl.col("kind") == "role")) | (
        (pl.col("other") == "d3") & (pl.col("other_kind") == "role")
    )
    keys = ["direction", "kind", "other", "other_kind"]
    one, other = (frame.sort(keys) for frame in (found, kept.filter(where)))
    assert one.select(keys).equals(other.select(keys))
    for column in ("base", "tuned", "delta", "z", "z_error"):
        assert np.allclose(one[column].to_numpy(), other[column].to_numpy(), rtol=1e-6, atol=1e-9), column


@pytest.mark.parametrize(
    ("part", "layer", "of", "message"),
    [
        ("qk", 1, "d3", "with 'd3': 2 directions are called so"),
        ("qk", 1, "nobody", "0 directions are called so, of 24"),
        ("mlp", 1, "PC1", "no interactions of 'mlp'"),
        ("qk", 9, "PC1", "measured were layers 0, 1, 2"),
    ],
)
def test_what_was_not_measured_is_refused(
    part: str, layer: int, of: str, message: str, runs: tuple[WeightsRun, WeightsRun]
) -> None:
    with pytest.raises(InputError, match=message):
        runs[0].interactions(part, layer, of=of)


def test_components_are_listed_both_ways(runs: tuple[WeightsRun, WeightsRun]) -> None:
    few, every = runs
    listed = few.report.component_interactions
    focus = {one.part: one.layer for one in reversed(few.report.focus)}
    assert len(listed) == 2 * 4 * 2 * 6
    for part, layer in focus.items():
        rows = every.interactions(part, layer)
        for name in ("PC1", "PC4"):
            for side, column in (("first", "direction"), ("second", "other")):
                all_pairs = rows.filter(pl.col(column) == name)
                ours = [one for one in listed if one.part == part and getattr(one, side) == name]
                strongest = [*all_pairs["z"].head(3), *all_pairs["z"].tail(3)]
                assert {one.layer for one in ours} == {layer}
                assert set(np.round(strongest, 6)) <= {round(one.z, 6) for one in ours}
