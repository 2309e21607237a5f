"""The MLP analysis: its numbers against numpy, planted changes, what must be zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.unit.weights.weights_pairs import directions, noisy, saved_pair
from trimtab.weights import DirectionSet, measure_mlp


def numpy_mlp(weights: dict[str, np.ndarray], layer: int, x: np.ndarray, eps: float) -> np.ndarray:
    """A Llama block's MLP, written again in float64."""
    name = f"model.layers.{layer}."
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights[f"{name}post_attention_layernorm.weight"]
    gate, up = (normed @ weights[f"{name}mlp.{one}_proj.weight"].T for one in ("gate", "up"))
    return (gate / (1 + np.exp(-gate)) * up) @ weights[f"{name}mlp.down_proj.weight"].T


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved_pair(tmp_path_factory.mktemp("mlp"), noisy)


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: one.double().numpy() for name, one in load_file(folder / "model.safetensors").items()}


def pick(rows: pl.DataFrame, layer: int, measure: str, sign: int = 1) -> pl.DataFrame:
    return rows.filter((pl.col("layer") == layer) & (pl.col("measure") == measure) & (pl.col("sign") == sign))


def test_every_number_is_that_of_numpy(models: tuple[Path, Path]) -> None:
    given = directions()
    run = measure_mlp(*models, given, dtype="float64", layers="0,2", pairs=None)
    rows = run.frame()
    base, tuned = (read(folder) for folder in models)
    units = given.units.numpy()
    assert rows["layer"].unique().sort().to_list() == [0, 2]
    for layer in (0, 2):
        for sign in (1, -1):
            before, after = (numpy_mlp(side, layer, sign * units, 1e-6) for side in (base, tuned))
            lengths = [np.linalg.norm(side, axis=1) for side in (before, after)]
            along = [(side * sign * units).sum(1) for side in (before, after)]
            cosine = (before * after).sum(1) / lengths[0] / lengths[1]
            expected = {
                "absolute": np.linalg.norm(after - before, axis=1),
                "angular": 1 - cosine,
                "length": lengths[1] - lengths[0],
                "parallel": along[1] - along[0],
                "orthogonal": np.sqrt(lengths[1] ** 2 - along[1] ** 2) - np.sqrt(lengths[0] ** 2 - along[0] ** 2),
            }
            for measure, values in expected.items():
                found = pick(rows, layer, measure, sign).filter(pl.col("other").is_null())
                assert found["direction"].to_list() == [one.name for one in given]
                assert np.abs(found["delta"].to_numpy() - values).max() < 1e-10 * max(1, np.abs(values).max())
            assert np.allclose(pick(rows, layer, "parallel", sign)["base"].to_numpy(), along[0], atol=1e-10)
        crossed = (numpy_mlp(tuned, layer, units, 1e-6) - numpy_mlp(base, layer, units, 1e-6)) @ units.T
        pairs = rows.filter((pl.col("layer") == layer) & pl.col("other").is_not_null())
        assert len(pairs) == len(given) * (len(given) - 1)
        places = {(one.kind, one.name): place for place, one in enumerate(given)}
        for row in pairs.iter_rows(named=True):
            a, b = places[row["kind"], row["direction"]], places[row["other_kind"], row["other"]]
            assert row["delta"] == pytest.approx(crossed[a, b], rel=1e-5, abs=1e-6)  # kept in float32


def test_z_is_against_the_controls_of_the_same_measure(models: tuple[Path, Path]) -> None:
    rows = measure_mlp(*models, directions(), layers=[1], controls=20).frame(controls=True)
    one = pick(rows, 1, "parallel").filter(pl.col("other").is_null())
    controls = one.filter(pl.col("kind") == "control")["delta"].to_numpy()
    assert len(controls) == 20
    own = one.filter(pl.col("kind") == "role")
    assert np.allclose(own["z"].to_numpy(), (own["delta"].to_numpy() - controls.mean()) / controls.std(ddof=1))
    assert (own["z_error"].to_numpy() > 0.1).all()
    turned = pick(rows, 1, "angular").filter(pl.col("other").is_null())
    roots = np.sqrt(turned.filter(pl.col("kind") == "control")["delta"].to_numpy())
    expected = (np.sqrt(turned["delta"].to_numpy()) - roots.mean()) / roots.std(ddof=1)
    assert np.allclose(turned["z"].to_numpy(), expected)


@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj", "down_proj"])
def test_a_planted_change_is_found(matrix: str, tmp_path: Path) -> None:
    """A rank-one change of one layer, read by one direction."""
    given = directions()
    place = given.labels.index("trait d3")
    # The one direction is an axis, so that no other direction reads the change.
    units = given.units.clone()
    units[:, 5] = 0
    units[place] = torch.eye(64, dtype=torch.float64)[5]
    planted = DirectionSet(about=given.about, units=units / units.norm(dim=1, keepdim=True))

    def change(model: nn.Module) -> None:
        layer = model.get_submodule("model.layers.1")
        weight = layer.get_submodule(f"mlp.{matrix}").weight
        x = layer.post_attention_layernorm.weight * planted.units[place].float() * 8  # what the norm makes of it
        if matrix == "down_proj":
            x = nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        source = torch.Generator().manual_seed(1)
        weight += 0.5 * torch.outer(torch.randn(len(weight), generator=source), x / x.norm())

    report = measure_mlp(*saved_pair(tmp_path, change), planted).report
    best = next(one for one in report.rankings if one.measure == "absolute")
    assert (best.layer, best.direction, best.kind) == (1, "d3", "trait")
    assert best.z > 5
    assert [one.layer for one in report.focus] == [1, 1]
    assert report.focus[0].top[0] == report.focus[1].top[0] == "trait d3"


def test_identical_models_are_zero_everywhere(models: tuple[Path, Path]) -> None:
    run = measure_mlp(models[0], models[0], directions(), average_layers=True)
    rows = run.frame(controls=True)
    for column in ("delta", "z"):
        assert rows[column].abs().max() == 0
    assert run.report.identical and not rows["layer"].is_null().all()


def test_means_over_layers_have_scores_of_their_own(models: tuple[Path, Path]) -> None:
    rows = measure_mlp(*models, directions(), average_layers=True).frame(controls=True)
    single = rows.filter(pl.col("other").is_null() & (pl.col("measure") == "absolute") & (pl.col("sign") == 1))
    mean = single.filter(pl.col("layer").is_null())
    layers = [single.filter(pl.col("layer") == layer)["delta"].to_numpy() for layer in range(3)]
    assert np.allclose(mean["delta"].to_numpy(), np.mean(layers, axis=0))
    controls = mean.filter(pl.col("kind") == "control")["delta"].to_numpy()
    assert np.allclose(mean["z"].to_numpy(), (mean["delta"].to_numpy() - controls.mean()) / controls.std(ddof=1))
