"""Susceptibility: planted changes come first, a scaled norm is no angle, numbers against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from tests.unit.weights.weights_pairs import directions, noisy, saved_pair
from trimtab.weights import measure_susceptibility

OWN = ("q", "k", "v", "gate", "up")


def planted(given: torch.Tensor, name: str) -> object:
    def change(model: nn.Module) -> None:
        layer = model.get_submodule("model.layers.2")
        module = layer.get_submodule(("self_attn." if name in "qkvo" else "mlp.") + f"{name}_proj")
        norm = layer.input_layernorm if name in "qkvo" else layer.post_attention_layernorm
        x = norm(given[None].float())[0]
        if name == "o":
            x = layer.self_attn.v_proj(x).view(2, 1, 16).expand(2, 2, 16).reshape(-1)
        if name == "down":
            x = nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        source = torch.Generator().manual_seed(2)
        weight = module.weight
        answer = torch.randn(len(weight), generator=source)
        weight += 0.3 * torch.outer(answer / answer.norm(), x / x.norm()) * weight.norm()

    return change


@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
def test_a_rank_one_change_of_one_matrix_comes_first(name: str, tmp_path: Path) -> None:
    given = directions()
    place = given.labels.index("role d4")
    run = measure_susceptibility(*saved_pair(tmp_path, planted(given.units[place], name)), given)  # type: ignore[arg-type]
    changed = [one for one in run.report.rankings if one.measure in ("relative_change", "angle")]
    best = changed[0]
    assert (best.layer, best.part, best.direction, best.kind) == (2, name, "d4", "role")
    assert best.z > 5
    rows = run.frame()
    others = rows.filter((pl.col("part") != name) | (pl.col("layer") != 2))
    assert others["delta"].abs().max() == 0  # what reads the changed matrix's output is not taken for changed
    matrix = max(run.report.matrices, key=lambda one: one.relative)
    assert (matrix.layer, matrix.matrix) == (2, name)
    assert matrix.effective_rank == pytest.approx(1, abs=1e-3)
    assert matrix.spectral[0] == pytest.approx(matrix.frobenius, rel=1e-4)


def test_numbers_are_those_of_numpy(tmp_path: Path) -> None:
    base, tuned = saved_pair(tmp_path, noisy)
    given = directions()
    rows = measure_susceptibility(base, tuned, given, layers=1, dtype="float64").frame()
    from safetensors.torch import load_file

    sides = [{k: v.double().numpy() for k, v in load_file(one / "model.safetensors").items()} for one in (base, tuned)]
    units = given.units.numpy()
    for name in OWN:
        outputs = []
        for side in sides:
            start = "model.layers.1."
            norm = "input_layernorm" if name in "qkv" else "post_attention_layernorm"
            path = f"{start}{'self_attn' if name in 'qkv' else 'mlp'}.{name}_proj.weight"
            normed = units / np.sqrt((units**2).mean(-1, keepdims=True) + 1e-6) * side[f"{start}{norm}.weight"]
            outputs.append(normed @ side[path].T)
        lengths = [np.linalg.norm(one, axis=1) for one in outputs]
        cosine = (outputs[0] * outputs[1]).sum(1) / lengths[0] / lengths[1]
        expected = {
            "relative_change": np.linalg.norm(outputs[1] - outputs[0], axis=1) / lengths[0],
            "angle": np.arccos(cosine),
            "cosine_distance": 1 - cosine,
            "norm_ratio": lengths[1] / lengths[0] - 1,
        }
        for measure, values in expected.items():
            found = rows.filter((pl.col("part") == name) & (pl.col("measure") == measure))
            assert np.allclose(found["delta"].to_numpy(), values, atol=1e-9), (name, measure)


def test_whole_matrices_come_with_the_errors_of_their_spectra(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base, tuned = saved_pair(tmp_path, noisy)
    for rank, exact in ((4, False), (32, True)):
        report = measure_susceptibility(base, tuned, directions(), layers=1, rank=rank).report
        found = next(one for one in report.matrices if one.matrix == "gate")
        sides = [load_file(one / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"] for one in (base, tuned)]
        true = torch.linalg.svdvals((sides[1] - sides[0]).double())
        assert len(found.spectral) == rank and (found.spectral_error == found.effective_rank_error == 0) == exact
        for value, one in zip(true.tolist(), found.spectral, strict=False):
            assert one * (1 - 1e-6) <= value <= (one**2 + found.spectral_error**2) ** 0.5 * (1 + 1e-6)
        effective = float(true.square().sum() ** 2 / true.pow(4).sum())
        assert abs(found.effective_rank - effective) <= 5 * found.effective_rank_error + 1e-3 * effective


def test_a_scaled_norm_changes_lengths_and_no_angle(tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        model.get_submodule("model.layers.1").input_layernorm.weight.mul_(1.1)

    run = measure_susceptibility(*saved_pair(tmp_path, change), directions())
    rows = run.frame().filter((pl.col("layer") == 1) & pl.col("part").is_in(["q", "k", "v"]))
    assert rows.filter(pl.col("measure") == "angle")["delta"].max() < 1e-6
    assert np.allclose(rows.filter(pl.col("measure") == "norm_ratio")["delta"].to_numpy(), 0.1, atol=1e-6)
    angles = run.frame(controls=True).filter(pl.col("measure").is_in(["angle", "cosine_distance"]))
    assert angles["z"].abs().max() < 1  # rounding is not taken for an angle, whatever the controls do
    norms = {(one.layer, one.norm): one for one in run.report.norms}
    assert norms[1, "attn_norm"].scale == pytest.approx(1.1)
    assert norms[1, "attn_norm"].angle < 1e-6 and norms[0, "attn_norm"].relative == 0
    assert max(one.relative for one in run.report.matrices) == 0


def test_identical_models_are_zero_everywhere(tmp_path: Path) -> None:
    base, _ = saved_pair(tmp_path, lambda model: None, "mixtral", 2)
    run = measure_susceptibility(base, base, directions())
    rows = run.frame(controls=True)
    assert rows["delta"].abs().max() == 0 and rows["z"].abs().max() == 0 and run.report.identical
    assert "experts.3.down" in rows["part"].unique().to_list()
    assert not any(one.part.startswith("experts") for one in run.report.grids)
    assert any("single experts" in note for note in run.report.notes)
