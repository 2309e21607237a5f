"""Capping configurations: each experiment against the formula of the code that they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.directions import load_capping
from trimtab.errors import SteeringError, VectorError

WIDTH = 6
G = torch.Generator().manual_seed(0)
A, B = torch.randn(WIDTH, generator=G) * 3, torch.randn(WIDTH, generator=G)


def config(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "vectors": {
            "calm": {"vector": A, "layer": 1},
            "role": {"vector": B, "layer": 3},
            "more": {"vector": B, "layer": 1},
        },
        "experiments": [
            {"id": "one", "interventions": [{"vector": "calm", "cap": 0.5}]},
            {"id": 2, "interventions": [{"vector": "calm", "cap": -1}, {"vector": "role", "cap": torch.tensor(0.25)}]},
            {"id": "twice", "interventions": [{"vector": "calm", "cap": 0.1}, {"vector": "more", "cap": 0.2}]},
        ],
    }
    return {**whole, **changes}


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path / "capping.pt")
    return path / "capping.pt"


def test_each_experiment_is_h_minus_relu_of_the_excess_along_the_unit_vector(tmp_path: Path) -> None:
    file = load_capping(saved(tmp_path, config()))
    assert list(file.steerings) == ["one", "2", "twice"]
    assert file.norms["calm"] == pytest.approx(float(A.double().norm()))
    h = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(5)) * 3
    for name, caps in {
        "one": {1: [(A, 0.5)]},
        "2": {1: [(A, -1.0)], 3: [(B, 0.25)]},
        "twice": {1: [(A, 0.1), (B, 0.2)]},
    }.items():
        program = file.steerings[name].resolve(num_layers=4, hidden_size=WIDTH)
        assert [site.layer for site in program] == list(caps)
        for site, one in program.items():
            expected = h.double()
            for vector, cap in caps[site.layer or 0]:
                u = vector.double() / vector.double().norm()
                expected = expected - torch.relu(expected @ u - cap)[:, None] * u
            got = one.apply(h, positions=torch.arange(9), prompt_length=4).h.double()
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def entry(**changes: Any) -> list[dict[str, Any]]:
    one = {"vector": "calm", "cap": 0.5}
    return [{"id": "x", "interventions": [{**one, **changes}]}]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"vectors": {}}, SteeringError, "no 'experiments'; keys: vectors"),
        ({"directions": {}, "experiments": []}, SteeringError, "no 'vectors'; keys: directions, experiments"),
        (config(experiments=entry(vector="angry")), SteeringError, "no 'angry'; keys: calm, role, more"),
        (
            config(experiments=[{"id": "x", "interventions": [{"vector": "calm"}]}]),
            SteeringError,
            r"experiments\[0\]\.interventions\[0\]: no 'cap'; keys: vector",
        ),
        (config(experiments=entry(cap=None)), SteeringError, "Cap has no bound"),
        (config(experiments=entry(cap=float("nan"))), SteeringError, "nan was given"),
        (config(experiments=[{"id": "x", "interventions": []}]), SteeringError, "no intervention"),
        (config(experiments=[{"interventions": []}]), SteeringError, "no 'id'; keys: interventions"),
        (
            config(experiments=[*config()["experiments"], *config()["experiments"]]),
            SteeringError,
            "'one' is used twice",
        ),
        (config(experiments=[]), SteeringError, "a list of experiments"),
        (
            config(vectors={"calm": {"vector": A, "layer": -1}}, experiments=entry()),
            SteeringError,
            "layer -1 is not a 0-based",
        ),
        (config(vectors={"calm": {"vector": A}}, experiments=entry()), SteeringError, "no 'layer'; keys: vector"),
        (config(vectors={"calm": {"vector": A * 0, "layer": 1}}, experiments=entry()), VectorError, "is zero"),
        (config(vectors={"calm": {"vector": "A", "layer": 1}}), VectorError, "holds a str; a tensor was expected"),
        (torch.ones(3), SteeringError, "expected a mapping with 'vectors', found a Tensor"),
    ],
)
def test_refusals_name_what_exists(tmp_path: Path, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_capping(saved(tmp_path, value))
