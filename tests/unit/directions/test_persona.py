"""Persona files: the discriminative direction by default, a mean only when asked for, never another entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.directions import load_direction
from trimtab.directions.persona import read_persona
from trimtab.errors import VectorError

LAYERS, WIDTH = 4, 6


def random(seed: int, layers: int = LAYERS) -> torch.Tensor:
    return torch.randn(layers, WIDTH, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


@pytest.fixture
def role(tmp_path: Path) -> Path:
    """The layout of a model's folder: roles/vectors/NAME.pt, and the defaults two folders up."""
    defaults = {"pos_1": random(7), "default_1": random(8), "all_1": random(9)}
    saved(tmp_path / "model" / "default_vectors.pt", {"activations": defaults, "metadata": {"model": "m"}})
    entries = {"pos_0": random(0), "pos_1": random(1), "pos_3": random(3), "pos_all": random(4)}
    return saved(tmp_path / "model" / "roles_240" / "vectors" / "lawyer.pt", entries)


@pytest.fixture
def trait(tmp_path: Path) -> Path:
    names = ("pos_neg", "pos_neg_50", "pos_default", "pos_default_50", "pos_70", "pos_40_70")
    return saved(tmp_path / "curious.pt", {name: random(seed) for seed, name in enumerate(names)})


def test_a_role_is_its_best_grade_minus_the_default(role: Path) -> None:
    for layer in range(LAYERS):
        found = load_direction(role, layer=layer)
        expected = random(3)[layer].double() - random(8)[layer].double()
        assert torch.equal(found.vector, expected.float())  # row l is the output of block l: no row of the embedding
        assert str(found.site) == f"layers.{layer}.resid_post"
    assert found.norm == pytest.approx(float(expected.norm()), rel=1e-6)
    assert "pos_3 - " in found.source and "[default_1]" in found.source


def test_a_trait_is_the_difference_of_clear_pairs(trait: Path) -> None:
    assert torch.equal(load_direction(trait, layer=2).vector, random(1)[2])
    assert torch.equal(load_direction(trait, layer=2, key="pos_default").vector, random(2)[2])
    assert read_persona(trait).kind == "trait"


def test_a_mean_is_taken_only_when_raw_is_asked_for(role: Path, trait: Path) -> None:
    assert torch.equal(load_direction(role, layer=1, key="raw:pos_all").vector, random(4)[1])
    assert torch.equal(load_direction(trait, layer=1, key="raw:pos_70").vector, random(4)[1])
    for path, key in ((role, "pos_3"), (trait, "pos_70")):
        with pytest.raises(VectorError, match=f"{key}. is a mean of activations.*ask for raw:{key}"):
            load_direction(path, layer=1, key=key)


@pytest.mark.parametrize(
    ("left", "options", "message"),
    [
        ({"pos_0", "pos_all"}, {}, "has no 'pos_3'; keys: pos_0, pos_all"),
        ({"pos_neg", "pos_70"}, {}, "has no 'pos_neg_50'; keys: pos_70, pos_neg"),
        ({"pos_neg", "pos_70"}, {"key": "pos_default"}, "has no 'pos_default'; keys: pos_70, pos_neg"),
        ({"pos_0", "pos_all"}, {"key": "raw:pos_2"}, "has no 'pos_2'; keys: pos_0, pos_all"),
    ],
)
def test_a_missing_key_names_those_that_exist(
    tmp_path: Path, left: set[str], options: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path / "some.pt", {name: random(1) for name in sorted(left)})
    with pytest.raises(VectorError, match=message):
        load_direction(path, layer=0, **options)


def test_a_role_without_defaults_is_not_returned_raw(role: Path) -> None:
    (role.parents[2] / "default_vectors.pt").unlink()
    with pytest.raises(VectorError, match=r"needs default_vectors.pt, which is not in .*or ask for raw:pos_3"):
        load_direction(role, layer=0)
    elsewhere = saved(role.parent / "elsewhere.pt", {"activations": {"pos_1": random(1)}})
    with pytest.raises(VectorError, match="has no 'default_1'; keys: pos_1"):
        read_persona(role).direction(0, default=elsewhere)


def test_defaults_of_another_model_are_refused(role: Path) -> None:
    other = saved(role.parent / "other.pt", {"activations": {"default_1": random(1, layers=LAYERS + 1)}})
    with pytest.raises(VectorError, match=r"shape \[5, 6\] and .*\[4, 6\]; take the defaults of the same model"):
        read_persona(role).direction(0, default=other)


def test_layers_are_asked_for_and_checked(role: Path, trait: Path) -> None:
    for path in (role, trait):
        with pytest.raises(VectorError, match="has layers 0 to 3; no layer was given"):
            load_direction(path)
        for layer in (-1, LAYERS):
            with pytest.raises(VectorError, match=f"layers 0 to 3; layer {layer} was asked for"):
                load_direction(path, layer=layer)


def test_what_is_no_persona_file(tmp_path: Path) -> None:
    both = saved(tmp_path / "both.pt", {"pos_3": random(0), "pos_neg": random(1)})
    with pytest.raises(VectorError, match="pos_3 of a role and pos_neg of a trait"):
        read_persona(both)
    with pytest.raises(VectorError, match="no key of a role or trait; keys: weight"):
        read_persona(saved(tmp_path / "w.pt", {"weight": random(0)}))
    with pytest.raises(VectorError, match=r"pos_3. is torch.float32 \[6\]; .*\[layers, d\] were expected"):
        read_persona(saved(tmp_path / "flat.pt", {"pos_3": random(0)[0]}))
    with pytest.raises(VectorError, match="entries of different shapes"):
        read_persona(saved(tmp_path / "odd.pt", {"pos_3": random(0), "pos_1": random(0, layers=2)}))
    bad = random(0)
    bad[1, 0] = float("nan")
    with pytest.raises(VectorError, match="1 of its 6 values are not finite"):
        load_direction(saved(tmp_path / "nan.pt", {"pos_neg_50": bad}), layer=1)
    with pytest.raises(VectorError, match="give one of them"):
        read_persona(tmp_path / "nan.pt").direction(0, key="pos_neg_50", raw="pos_neg_50")


def test_half_precision_is_subtracted_in_float64(role: Path) -> None:
    entries = {"pos_3": random(3).bfloat16()}
    saved(role, entries)
    saved(role.parents[2] / "default_vectors.pt", {"activations": {"default_1": random(8).bfloat16()}})
    expected = random(3).bfloat16().double() - random(8).bfloat16().double()
    assert torch.equal(load_direction(role, layer=2).vector, expected[2].float())
