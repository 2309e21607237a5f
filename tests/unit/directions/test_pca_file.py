"""PCA files: components mapped back through the scaler; whatever else a pickle names is refused by that name."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.directions import load_direction
from trimtab.directions.pca_file import read_pca
from trimtab.errors import VectorError

decomposition = pytest.importorskip("sklearn.decomposition")
preprocessing = pytest.importorskip("sklearn.preprocessing")

WIDTH, ROWS = 12, 40


def states() -> np.ndarray[Any, Any]:
    source = np.random.default_rng(0)
    return source.normal(size=(ROWS, WIDTH)) * np.geomspace(0.1, 50, WIDTH) + 7.0


def contents(**scaling: Any) -> dict[str, Any]:
    x = states()
    scaler = preprocessing.StandardScaler(**scaling).fit(x)
    pca = decomposition.PCA().fit(scaler.transform(x))
    return {
        "layer": 22,
        "roles": {"pos_3": ["lawyer", "poet"]},
        "vectors": {"pos_3": [torch.zeros(WIDTH)]},
        "pca_transformed": pca.transform(scaler.transform(x)),
        "variance_explained": pca.explained_variance_ratio_,
        "n_components": WIDTH,
        "pca": pca,
        "scaler": scaler,
    }


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("scaling", [{}, {"with_mean": False}, {"with_std": False}])
def test_projections_are_those_of_sklearn(tmp_path: Path, scaling: dict[str, Any]) -> None:
    whole = contents(**scaling)
    file = read_pca(saved(tmp_path / "layer22_pos3.pt", whole))
    expected = whole["pca"].transform(whole["scaler"].transform(states()))
    assert np.allclose(file.project(torch.from_numpy(states())).numpy(), expected, rtol=1e-9, atol=1e-9)
    assert (file.layer, dict(file.names)) == (22, {"pos_3": ("lawyer", "poet")})


def test_a_direction_is_mapped_back_through_the_scaler(tmp_path: Path) -> None:
    path = saved(tmp_path / "layer22_pos3.pt", contents())
    file, found = read_pca(path), load_direction(path, key="PC2", layer=22)
    x = torch.from_numpy(states())
    moved = file.project(x + 3.0 * found.vector.double()) - file.project(x)
    expected = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    expected[:, 1] = 3.0  # a step along the direction moves its own coordinate, and no other
    assert torch.allclose(moved, expected, atol=1e-5)  # the direction is float32
    bare = file.components[1]
    assert float(torch.cosine_similarity(bare, found.vector.double(), dim=0).abs()) < 0.9
    assert str(found.site) == "layers.22.resid_post"


def test_a_component_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "p.pt", contents())
    for key, message in [
        (None, "no key was given; name one as PC1"),
        ("2", "'2' was asked for; name one as PC1"),
        ("PC0", "has PC1 to PC12; PC0 was asked for"),
        ("PC13", "has PC1 to PC12; PC13 was asked for"),
    ]:
        with pytest.raises(VectorError, match=message):
            load_direction(path, key=key)
    with pytest.raises(VectorError, match="is a vector of layer 22; layer 3 was asked for"):
        load_direction(path, key="PC1", layer=3)


class Hostile:
    """Runs a function of the attacker's choice when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.made = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.made


@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, r"(posix|nt)\.system"), (eval, "eval"), (np.load, "numpy.load"), (pickle.loads, "_?pickle.loads")],
)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, function: Callable[..., Any], named: str) -> None:
    witness = tmp_path / "witness"
    argument = f"touch {witness}" if function is os.system else f"open({str(witness)!r}, 'w')"
    path = saved(tmp_path / "h.pt", {**contents(), "extra": Hostile(function, argument)})
    for read in (read_pca, lambda one: load_direction(one, key="PC1")):
        with pytest.raises(VectorError, match=f"names .*{named}, which a PCA file does not need"):
            read(path)
    assert not witness.exists()


def test_another_estimator_is_refused_by_name(tmp_path: Path) -> None:
    other = decomposition.FastICA(n_components=2, whiten="unit-variance").fit(states())
    with pytest.raises(VectorError, match=r"names sklearn.decomposition._fastica.FastICA, which"):
        read_pca(saved(tmp_path / "ica.pt", {**contents(), "pca": other}))
    with pytest.raises(VectorError, match=r"\[pca\] is a StandardScaler; PCA was expected"):
        read_pca(saved(tmp_path / "swap.pt", {**contents(), "pca": contents()["scaler"]}))


def test_objects_inside_arrays_are_refused(tmp_path: Path) -> None:
    inside = np.array([Hostile(os.system, "true")], dtype=object)
    with pytest.raises(VectorError, match=r"posix.system|nt.system"):
        read_pca(saved(tmp_path / "o.pt", {**contents(), "extra": inside}))
    names = contents()
    names["pca"].feature_names_in_ = np.array(["a"], dtype=object)
    with pytest.raises(VectorError, match="ObjectDType"):
        read_pca(saved(tmp_path / "n.pt", names))


def test_an_array_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    whole = contents()
    whole["pca"].components_ = Hostile(np.ndarray, (1 << 60, WIDTH))
    with pytest.raises(VectorError, match="not loaded"):
        read_pca(saved(tmp_path / "huge.pt", whole))
    whole["pca"].components_ = Hostile(np.ndarray, (1 << 14, WIDTH))
    with pytest.raises(VectorError, match="components_ has shape"):
        read_pca(saved(tmp_path / "large.pt", whole))


def test_a_file_written_by_numpy_1_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "p.pt", contents())
    old = tmp_path / "old.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            target.writestr(entry.filename, data)
    assert torch.equal(read_pca(old).components, read_pca(path).components)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": None}, "layer None is not a 0-based layer"),
        ({"layer": -1}, "layer -1 is not a 0-based layer"),
        ({"scaler": preprocessing.StandardScaler()}, "mean_ is NoneType"),
        ({"pca": decomposition.PCA()}, "components_ is NoneType"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(VectorError, match=message):
        read_pca(saved(tmp_path / "p.pt", {**contents(), **change}))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    whole = contents()
    del whole["scaler"]
    with pytest.raises(VectorError, match="has no scaler; keys: layer, roles, vectors"):
        read_pca(saved(tmp_path / "p.pt", whole))
    with pytest.raises(VectorError, match="no such file"):
        read_pca(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a torch file")
    with pytest.raises(VectorError, match="is not loaded"):
        read_pca(tmp_path / "text.pt")
