"""A change for its length: against numpy, and what it must not depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from tests.unit.weights.weights_pairs import directions, noisy, saved_pair
from trimtab.weights import measure_attention, measure_mlp, measure_susceptibility
from trimtab.weights._excess import excess
from trimtab.weights._rows import score

MEASURES = {"susceptibility": measure_susceptibility, "mlp": measure_mlp, "attention": measure_attention}
UNIT = 2.0**-24
CONTROLS = range(10, 74)


def drawn(slope: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten directions whose answers are ten times as long as those of 64 controls; all move alike for their length."""
    source = np.random.default_rng(seed)
    lengths = np.exp(source.normal(0, 0.4, 74))
    lengths[:10] *= 10
    moved = 0.05 * lengths**slope * np.exp(source.normal(0, 0.15, 74))
    return torch.from_numpy(moved), torch.from_numpy(lengths)


@pytest.mark.parametrize(("slope", "kept"), [(0.0, None), (0.6, None), (1.0, None), (1.8, 1.0), (-0.7, 0.0)])
def test_numbers_are_those_of_numpy(slope: float, kept: float | None) -> None:
    moved, lengths = drawn(slope)
    found = excess("mlp", moved, lengths, CONTROLS, UNIT)
    x, y = lengths.numpy(), moved.numpy()
    fitted = np.clip(np.polyfit(np.log(x[10:]), np.log(y[10:]), 1)[0], 0, 1) if kept is None else kept
    expected = x**fitted * (y[10:] / x[10:] ** fitted).mean()
    assert np.allclose(found.delta.numpy(), y / expected, rtol=1e-12)
    assert found.delta[10:].mean() == pytest.approx(1)


@pytest.mark.parametrize("slope", [0.3, 0.6, 1.0])
def test_long_answers_do_not_stand_out_for_their_length(slope: float) -> None:
    moved, lengths = drawn(slope)
    z = score(excess("mlp", moved, lengths, CONTROLS, UNIT), list(CONTROLS), UNIT).z
    assert np.abs(z[:10]).max() < 4 < (moved[:10].mean() - moved[10:].mean()) / moved[10:].std()
    moved[3] *= 3
    z = score(excess("mlp", moved, lengths, CONTROLS, UNIT), list(CONTROLS), UNIT).z
    assert z[:10].argmax() == 3 and z[3] > 8


def test_what_did_not_move_is_zero_and_rounding_is_no_change() -> None:
    _, lengths = drawn(0.5)
    still = torch.zeros(74, dtype=torch.float64)
    assert excess("mlp", still, lengths, CONTROLS, UNIT).delta.abs().max() == 0
    moved = still.clone()
    moved[2], moved[3] = 1.0, UNIT * float(lengths.max())
    z = score(excess("mlp", moved, lengths, CONTROLS, UNIT), list(CONTROLS), UNIT).z
    assert z[2] > 1e4 and z[3] < 1
    assert np.abs(z[[0, 1, *range(4, 74)]]).max() == 0


def test_answers_of_one_length_or_none_have_no_slope() -> None:
    moved, lengths = drawn(0.0)
    same = excess("mlp", moved, torch.ones_like(lengths), CONTROLS, UNIT).delta
    assert torch.allclose(same, moved / moved[10:].mean())
    silent = excess("mlp", moved, torch.zeros_like(lengths), CONTROLS, UNIT).delta
    assert torch.allclose(silent, moved / moved[10:].mean())


MOVED = {"mlp": ("absolute", "length"), "attention": ("change", "length"), "susceptibility": (None, "norm_ratio")}


@pytest.mark.parametrize("name", MOVED)
def test_every_analysis_divides_its_own_change_by_its_own_length(name: str, tmp_path: Path) -> None:
    given = directions()
    run = MEASURES[name](*saved_pair(tmp_path, noisy), given, dtype="float64", layers=[1], controls=32)
    rows = run.frame(controls=True).filter(pl.col("head").is_null() & pl.col("other").is_null())
    places = rows.filter(pl.col("measure") == "excess").select("part", "sign").unique().rows()
    assert len(places) == {"mlp": 2, "attention": 1, "susceptibility": 7}[name]
    for part, sign in places:
        one = {
            measure: frame
            for (measure,), frame in rows.filter((pl.col("part") == part) & (pl.col("sign") == sign))
            .partition_by("measure", as_dict=True)
            .items()
        }
        change, length = MOVED[name]
        lengths = one[length]["base"].to_numpy()
        moved = (
            one["relative_change"]["delta"].to_numpy() * lengths if change is None else one[change]["delta"].to_numpy()
        )
        x, y = np.log(lengths), np.log(moved)
        slope = np.clip(np.polyfit(x[len(given) :], y[len(given) :], 1)[0], 0, 1)
        share = moved / lengths**slope
        assert np.allclose(one["excess"]["delta"].to_numpy(), share / share[len(given) :].mean(), rtol=1e-7)
