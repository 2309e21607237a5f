"""SteeringVector: direction and norm, files, and the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import SteeringError, VectorError
from trimtab.steering import Add, Cap, Steering, SteeringVector


def example() -> SteeringVector:
    return SteeringVector.of(
        torch.tensor([3.0, 0.0, -4.0]),
        site="layers.2.resid_post",
        recipe={"method": "mean_difference", "pairs": 12},
        model_digest="ab12",
        data_hash="cd34",
        quantiles={0.9: 4.0, 0.25: -0.1},
        median_norm=11.5,
        provenance={"seed": 3, "model": "testbed"},
    )


def test_a_vector_is_split_into_direction_and_norm() -> None:
    vector = example()
    assert vector.norm == 5.0
    assert vector.direction.tolist() == pytest.approx([0.6, 0.0, -0.8])
    assert vector.vector.tolist() == [3.0, 0.0, -4.0]
    assert vector.quantile(0.25) == -0.1


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_norm_times_direction_is_the_vector_to_one_rounding(seed: int, scale: float) -> None:
    raw = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * scale
    again = SteeringVector.of(raw).vector
    torch.testing.assert_close(again, raw, rtol=2.0**-22, atol=0)  # two float32 roundings


def test_saving_and_loading_gives_back_everything(tmp_path: Path) -> None:
    example().save(tmp_path / "v.safetensors")
    again = SteeringVector.load(tmp_path / "v.safetensors")
    assert again == example()
    assert hash(again) == hash(example())
    assert list(again.quantiles) == [0.25, 0.9]
    bare = SteeringVector.of([1.0])
    bare.save(tmp_path / "w.safetensors")
    assert SteeringVector.load(tmp_path / "w.safetensors") == bare


def test_ops_take_it_as_it_is() -> None:
    vector = example()
    assert Add(vector).vector.tolist() == [3.0, 0.0, -4.0]
    assert torch.equal(Cap(vector, max=1.0).direction, vector.direction)
    h = torch.zeros(1, 3)
    (site,) = (
        Steering({"layers.2.resid_post": Add(vector, 2.0, "median_norm")}).resolve(num_layers=3, hidden_size=3).values()
    )
    out = site.apply(h, positions=torch.tensor([0]), prompt_length=1).h
    assert float(out.norm()) == pytest.approx(2 * 11.5, rel=1e-6)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SteeringVector.of([0.0, 0.0]), VectorError, "is zero and has no direction"),
        (lambda: SteeringVector.of([float("nan")]), VectorError, "not finite"),
        (lambda: SteeringVector(direction=[1.0], norm=0.0), VectorError, "norm=0: a norm is above 0"),
        (lambda: SteeringVector(direction=[1.0], norm=float("inf")), SteeringError, "inf was given"),
        (
            lambda: example().quantile(0.5),
            VectorError,
            "no quantile 0.5 was calibrated for this vector; stored: 0.25, 0.9",
        ),
        (lambda: SteeringVector.of([1.0]).quantile(0.5), VectorError, "stored: none"),
    ],
)
def test_refusals(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, v, t: m.update(version="9"), "newer Trimtab"),
        (lambda m, v, t: v.update(colour="red"), "unknown keys colour; known: data_hash"),
        (lambda m, v, t: v.pop("norm"), "missing keys norm"),
        (lambda m, v, t: t["direction"].neg_(), "does not match its digest"),
        (lambda m, v, t: t.update(more=torch.ones(1)), "unknown keys more"),
        (lambda m, v, t: v.update(quantiles=3), "its metadata is not that of a vector"),
        (lambda m, v, t: v.update(norm="big"), "a number was expected"),
    ],
)
def test_a_file_with_anything_unknown_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "v.safetensors"
    example().save(path)
    with safetensors.safe_open(str(path), framework="pt") as stream:
        metadata, tensors = stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    about = json.loads(metadata["vector"])
    change(metadata, about, tensors)
    metadata["vector"] = json.dumps(about)
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(SteeringError, match=message):
        SteeringVector.load(path)
