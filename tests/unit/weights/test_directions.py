"""Sets of directions: nothing merged, nothing rounded, controls that are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from trimtab.errors import InputError, VectorError
from trimtab.weights import DirectionSet, covariance_matched, isotropic, read_directions, shuffled_labels
from trimtab.weights.directions import join, make_controls

LAYERS, WIDTH = 4, 8


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def personas(tmp_path: Path) -> Path:
    """Two roles and two traits, one name in common, as persona work lays them out."""
    folder = tmp_path / "model"
    for kind, names in (("roles_240", ("layer2", "layer10", "curious")), ("traits_240", ("curious", "warm"))):
        (folder / kind / "vectors").mkdir(parents=True)
        for number, name in enumerate(names):
            rows = {key: drawn(number + place, LAYERS, WIDTH) for place, key in enumerate(
                ("pos_3", "pos_all") if kind == "roles_240" else ("pos_neg_50", "pos_70")
            )}  # fmt: skip
            torch.save(rows, folder / kind / "vectors" / f"{name}.pt")
    torch.save({"activations": {"default_1": drawn(99, LAYERS, WIDTH)}}, folder / "default_vectors.pt")
    return folder


def test_a_role_and_a_trait_may_share_a_name(personas: Path) -> None:
    found = read_directions(personas, layer=2, hidden_size=WIDTH)
    # "layer2" before "layer10", and five directions of four names
    assert found.labels == ("role curious", "role layer2", "role layer10", "trait curious", "trait warm")
    expected = drawn(0, LAYERS, WIDTH)[2].double() - drawn(99, LAYERS, WIDTH)[2].double()
    row = found.units[found.labels.index("role layer2")]
    assert torch.allclose(row, (expected.float().double() / expected.norm()), atol=1e-7)
    assert found.layer == 2
    assert found.about[1].norm == pytest.approx(float(expected.norm()), rel=1e-6)


def test_units_are_normalised_in_float64() -> None:
    vector = drawn(1, 1000).to(torch.bfloat16)
    found = DirectionSet.of({"a": vector}, kind="trait")
    assert found.units.dtype == torch.float64
    assert abs(float(found.units.norm()) - 1) < 1e-15
    assert torch.equal(found.units[0], vector.double() / vector.double().norm())


def test_components_keep_number_and_variance(tmp_path: Path) -> None:
    decomposition, preprocessing = (
        pytest.importorskip(f"sklearn.{name}") for name in ("decomposition", "preprocessing")
    )
    states = drawn(3, 40, WIDTH).double().numpy() * np.geomspace(1, 9, WIDTH)
    scaler = preprocessing.StandardScaler().fit(states)
    pca = decomposition.PCA().fit(scaler.transform(states))
    file = tmp_path / "pca.pt"
    torch.save({"layer": 2, "pca": pca, "scaler": scaler, "roles": {"pos_3": ["x"]}}, file)
    found = read_directions(f"{file}#PC1-PC2,PC4")
    assert [(one.name, one.number, one.kind) for one in found] == [("PC1", 1, "pc"), ("PC2", 2, "pc"), ("PC4", 4, "pc")]
    assert [one.variance for one in found] == pytest.approx(pca.explained_variance_ratio_[[0, 1, 3]].tolist())
    step = torch.from_numpy(pca.components_[3] * scaler.scale_)  # a step along a component, in activation space
    assert torch.allclose(found.units[2], step / step.norm(), atol=1e-6)
    assert len(read_directions(str(file))) == WIDTH


def test_latents_are_decoder_rows(tmp_path: Path) -> None:
    rows = drawn(4, 30, WIDTH)
    weights = {"W_enc": drawn(5, WIDTH, 30), "W_dec": rows, "b_enc": torch.zeros(30), "b_dec": torch.zeros(WIDTH)}
    file = tmp_path / "sae.safetensors"
    save_file(weights, file)
    found = read_directions(f"{file}#3,17,20-21")
    assert found.labels == ("latent 3", "latent 17", "latent 20", "latent 21")
    assert torch.allclose(found.units[1], rows[17].double() / rows[17].double().norm(), atol=1e-12)
    with pytest.raises(InputError, match="name latents, as"):
        read_directions(str(file))
    with pytest.raises(VectorError, match="latents 0 to 29"):
        read_directions(f"{file}#30")


def test_files_are_named_and_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", drawn(ord(name), WIDTH).numpy())
    found = read_directions(
        [f"trait:kind={tmp_path / 'a.npy'}", str(tmp_path / "b.npy"), "random:3"], hidden_size=WIDTH
    )
    assert found.labels == ("trait kind", "vector b", "vector random:3")
    with pytest.raises(InputError, match=r"two directions are called 'vector b': .*b.npy and .*b.npy"):
        read_directions([tmp_path / "b.npy", tmp_path / "b.npy"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], InputError, "no directions were given"),
        ({"a": torch.zeros(4)}, VectorError, "zero or holds values"),
        ({"a": torch.tensor([1.0, float("nan")])}, VectorError, "not finite"),
        ({"a": torch.ones(4), "b": torch.ones(5)}, VectorError, r"\[4\] was expected"),
        ("no/such.npy", VectorError, "no such file"),
        ({"a": torch.ones(4)}, VectorError, "width 4 and the model has hidden size 8"),
    ],
)
def test_bad_directions_are_one_line(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        read_directions(given, hidden_size=8)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_directions_of_two_layers_are_refused(personas: Path) -> None:
    with pytest.raises(VectorError, match=r"made at layer 1 and .* at layer 2"):
        join([read_directions(personas, layer=1), read_directions({"x": torch.ones(WIDTH)}),
              DirectionSet.of({"y": torch.ones(WIDTH)}, layer=2)])  # fmt: skip
    with pytest.raises(VectorError, match="say whose to take"):
        read_directions(personas)


def test_isotropic_controls_are_uniform() -> None:
    found = isotropic(4000, 16, seed=0)
    assert torch.allclose(found.units.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    # a coordinate of a uniform unit vector: sqrt(Beta(1/2, (d - 1)/2)) with a random sign
    squares = (found.units[:, 3] ** 2).numpy()
    assert stats.kstest(squares, stats.beta(0.5, 7.5).cdf).pvalue > 1e-3
    assert torch.equal(isotropic(3, 16, seed=5).units, isotropic(3, 16, seed=5).units)


def test_matched_controls_have_the_covariance_of_the_states() -> None:
    shape = torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.5])).double()
    turn = torch.linalg.qr(drawn(7, 4, 4).double()).Q
    states = drawn(8, 500, 4).double() @ shape @ turn + 10.0
    found = covariance_matched(states, 20_000, seed=1)
    norms = torch.tensor([one.norm for one in found])
    raw = found.units * norms[:, None]
    expected = torch.cov(states.T) * 499
    assert float((torch.cov(raw.T) - expected).norm() / expected.norm()) < 0.03
    assert {one.control for one in found} == {"covariance"}


def test_shuffled_controls_are_differences_of_means() -> None:
    states, labels = drawn(9, 30, 4), torch.tensor([1] * 10 + [0] * 20)
    found = shuffled_labels(states, labels, 9, seed=3)
    source = np.random.RandomState(3)
    for one, unit in zip(found, found.units, strict=True):
        order = source.permutation(30)
        chosen = labels.numpy()[order] == 1
        gap = states[torch.from_numpy(chosen)].double().mean(0) - states[torch.from_numpy(~chosen)].double().mean(0)
        assert torch.allclose(unit, gap / gap.norm(), atol=1e-12)
        assert one.norm == pytest.approx(float(gap.norm()))
    with pytest.raises(InputError, match="both, were expected"):
        shuffled_labels(states, torch.ones(30), 9, seed=0)


def test_controls_are_refused_when_they_cannot_be_made() -> None:
    with pytest.raises(InputError, match="7 controls were asked for; a z-score needs at least 8"):
        make_controls(7, WIDTH, seed=0)
    with pytest.raises(InputError, match="covariance controls are made of states"):
        make_controls(8, WIDTH, seed=0, kinds=["covariance"])
    with pytest.raises(InputError, match="one of isotropic, covariance, shuffled"):
        make_controls(8, WIDTH, seed=0, kinds=["gaussian"])  # type: ignore[list-item]
    with pytest.raises(VectorError, match="width 3"):
        make_controls(8, WIDTH, seed=0, kinds=["shuffled"], states=drawn(0, 9, 3))
    with pytest.raises(InputError, match="all 5 states are alike"):
        make_controls(8, WIDTH, seed=0, kinds=["shuffled"], states=torch.ones(5, WIDTH))
    both = make_controls(8, WIDTH, seed=0, kinds=["isotropic", "covariance"], states=drawn(0, 9, WIDTH))
    assert len(both.places(control="isotropic")) == len(both.places(control="covariance")) == 8
