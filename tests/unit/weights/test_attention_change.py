"""The attention analysis: affinities and promotions against numpy, heads that add up, planted changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.unit.weights.weights_pairs import directions, noisy, saved_pair
from trimtab.errors import InputError
from trimtab.weights import measure_attention

HEADS, KV, DIM = 4, 2, 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved_pair(tmp_path_factory.mktemp("attention"), noisy)


def numpy_attention(folder: Path, layer: int, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """QK [heads, n, n] and VO [heads, n, d] of a Llama block at offset 0, written again in float64."""
    weights = {k: v.double().numpy() for k, v in load_file(folder / "model.safetensors").items()}
    start = f"model.layers.{layer}."
    normed = units / np.sqrt((units**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{start}input_layernorm.weight"]
    q, k, v = (normed @ weights[f"{start}self_attn.{one}_proj.weight"].T for one in "qkv")
    q, k, v = (one.reshape(len(units), -1, DIM) for one in (q, k, v))
    out = weights[f"{start}self_attn.o_proj.weight"].reshape(-1, HEADS, DIM)
    group = HEADS // KV
    qk = np.stack([q[:, head] @ k[:, head // group].T / DIM**0.5 for head in range(HEADS)])
    vo = np.stack([v[:, head // group] @ out[:, head].T for head in range(HEADS)])
    return qk, vo


def test_every_number_is_that_of_numpy(models: tuple[Path, Path]) -> None:
    given = directions()
    run = measure_attention(*models, given, layers="1", dtype="float64", pairs=None)
    rows = run.frame()
    units = given.units.numpy()
    (qk, vo), (qk_tuned, vo_tuned) = (numpy_attention(folder, 1, units) for folder in models)
    diagonal = np.einsum("hii->hi", qk), np.einsum("hii->hi", qk_tuned)
    own = np.einsum("hnd,nd->hn", vo, units), np.einsum("hnd,nd->hn", vo_tuned, units)

    def column(part: str, measure: str, head: int | None, name: str, sign: int = 1) -> np.ndarray:
        where = pl.col("head").is_null() if head is None else pl.col("head") == head
        chosen = (pl.col("part") == part) & (pl.col("measure") == measure) & (pl.col("sign") == sign) & where
        return rows.filter(chosen & pl.col("other").is_null())[name].to_numpy()

    for head in range(HEADS):
        assert np.allclose(column("qk", "affinity", head, "base"), diagonal[0][head], atol=1e-10)
        assert np.allclose(column("qk", "affinity", head, "tuned", -1), -diagonal[1][head], atol=1e-10)
        assert np.allclose(column("vo", "promotion", head, "tuned"), own[1][head], atol=1e-10)
        change = np.linalg.norm(vo_tuned[head] - vo[head], axis=1)
        assert np.allclose(column("vo", "change", head, "delta"), change, atol=1e-10)
    assert np.allclose(column("qk", "affinity", None, "delta"), (diagonal[1] - diagonal[0]).mean(0), atol=1e-10)
    assert np.allclose(column("vo", "promotion", None, "base"), own[0].sum(0), atol=1e-10)  # heads add up
    assert np.allclose(column("vo", "promotion", None, "base", -1), own[0].sum(0), atol=1e-10)
    assert np.allclose(
        column("vo", "change", None, "delta"), np.linalg.norm((vo_tuned - vo).sum(0), axis=1), atol=1e-10
    )
    expected = {"qk": (qk.mean(0), qk_tuned.mean(0)), "vo": (vo.sum(0) @ units.T, vo_tuned.sum(0) @ units.T)}
    places = {(one.kind, one.name): place for place, one in enumerate(given)}
    pairs = rows.filter(pl.col("other").is_not_null())
    assert len(pairs) == 2 * len(given) * (len(given) - 1)
    for row in pairs.iter_rows(named=True):
        at = places[row["kind"], row["direction"]], places[row["other_kind"], row["other"]]
        base, tuned = expected[row["part"]]
        assert (row["base"], row["tuned"]) == pytest.approx((base[at], tuned[at]), abs=1e-5)  # kept in float32


def test_interactions_are_scored_against_pairs_of_controls(models: tuple[Path, Path]) -> None:
    given = directions()
    run = measure_attention(*models, given, layers=[0], controls=12, pairs=None)
    cross = run.store.crosses(0)["qk"]
    controls = cross.delta[len(given) :, len(given) :].double().numpy()
    off = controls[~np.eye(12, dtype=bool)]
    listed = run.interactions("qk", 0)
    for row in listed.head(3).iter_rows(named=True):
        assert row["z"] == pytest.approx((row["delta"] - off.mean()) / off.std(ddof=1), rel=1e-4)
    assert listed["z"].is_sorted(descending=True) and listed["z"][-1] < -1  # both ends are there
    few = measure_attention(*models, given, layers=[0], controls=12, pairs=5).interactions("qk", 0)
    assert few["z"][:5].to_list() == pytest.approx(listed["z"][:5].to_list())
    assert few["z"][-5:].to_list() == pytest.approx(listed["z"][-5:].to_list())
    with pytest.raises(InputError, match="the mean needs average_layers"):
        run.interactions("qk", None)


@pytest.mark.parametrize("head", [0, 1])
def test_a_change_of_one_value_head_is_found(head: int, tmp_path: Path) -> None:
    given = directions()
    place = given.labels.index("trait d7")

    def change(model: nn.Module) -> None:
        layer = model.get_submodule("model.layers.1")
        x = layer.input_layernorm(given.units[place][None].float())[0]
        source = torch.Generator().manual_seed(3)
        value = torch.randn(DIM, generator=source)
        layer.self_attn.v_proj.weight[head * DIM : (head + 1) * DIM] += 0.3 * torch.outer(value, x / x.norm())

    report = measure_attention(*saved_pair(tmp_path, change), given).report
    best = next(one for one in report.rankings if one.measure == "change" and one.head is not None)
    assert (best.part, best.layer, best.direction, best.kind) == ("vo", 1, "d7", "trait")
    assert best.head in (2 * head, 2 * head + 1)  # the two query heads that share the changed one
    assert best.z > 5
    heads = [one for one in report.heads if one.part == "vo" and one.z > 5]
    assert {(one.layer, one.head) for one in heads} == {(1, 2 * head), (1, 2 * head + 1)}
    assert all(one.z == 0 for one in report.heads if one.part == "qk")


def test_a_planted_affinity_is_found_between_two_directions(tmp_path: Path) -> None:
    """One query head looks for one direction, and the shared key head answers with another one."""
    given = directions()
    query, key = given.units[given.labels.index("role d1")], given.units[given.labels.index("trait d2")]

    def change(model: nn.Module) -> None:
        layer = model.get_submodule("model.layers.2")
        code = torch.zeros(DIM)
        code[3] = 1
        for name, unit in (("q", query), ("k", key)):
            weight = layer.get_submodule(f"self_attn.{name}_proj").weight
            x = layer.input_layernorm(unit[None].float())[0]
            weight[:DIM] += 2 * torch.outer(code, x / x.norm())

    report = measure_attention(*saved_pair(tmp_path, change), given).report
    best = next(one for one in report.interactions if one.part == "qk")
    assert (best.layer, best.first, best.first_kind, best.second, best.second_kind) == (2, "d1", "role", "d2", "trait")
    assert best.z > 5
    assert [one.z for one in report.interactions if one.part == "vo"] == [0.0] * sum(
        one.part == "vo" for one in report.interactions
    )


def test_the_offset_turns_the_keys(models: tuple[Path, Path]) -> None:
    near, far = (measure_attention(*models, directions(), layers=1, offset=offset).frame() for offset in (0, 3))
    chosen = (pl.col("part") == "qk") & pl.col("other").is_null()
    assert not np.allclose(near.filter(chosen)["base"].to_numpy(), far.filter(chosen)["base"].to_numpy(), atol=1e-2)
    assert near.filter(~chosen & (pl.col("part") == "vo"))["base"].equals(
        far.filter(~chosen & (pl.col("part") == "vo"))["base"]
    )
    with pytest.raises(InputError, match="offset=-1"):
        measure_attention(*models, directions(), offset=-1)


def test_layers_without_softmax_attention_are_named(tmp_path: Path) -> None:
    report = measure_attention(*saved_pair(tmp_path, noisy, "qwen3_next", 2), directions(components=0)).report
    assert any("layers 0 mix tokens without softmax attention" in note for note in report.notes)
    assert {one.layer for one in report.rankings} <= {1, None}
