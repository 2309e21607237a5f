"""Patch, LowRank and Edit against what they say, and their refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.errors import NonFiniteError, SteeringError, VectorError
from trimtab.steering import Edit, LowRank, Op, Patch, Steering

WIDTH = 6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(h: torch.Tensor, op: Op, positions: Any = "all", start: int = 0) -> torch.Tensor:
    (site,) = Steering({"embed": op}, positions=positions).resolve(num_layers=1, hidden_size=h.shape[-1]).values()
    return site.apply(h, positions=torch.arange(start, start + len(h)), prompt_length=4).h


def test_a_patch_replaces_rows_by_position() -> None:
    h, source = random(5, WIDTH), random(3, WIDTH, seed=1)
    out = run(h, Patch(source, positions=[4, 1, 3]), positions=[1, 3, 4])
    torch.testing.assert_close(out[[4, 1, 3]], source, rtol=0, atol=1e-6)
    assert torch.equal(out[[0, 2]], h[[0, 2]])
    late = run(h[3:], Patch(source, positions=[4, 1, 3]), positions=[4], start=3)
    torch.testing.assert_close(late[1], source[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_weight_interpolates(weight: float) -> None:
    h, source = random(4, WIDTH), random(WIDTH, seed=1)
    torch.testing.assert_close(run(h, Patch(source, weight)), (1 - weight) * h + weight * source, rtol=0, atol=1e-6)


def test_a_patch_in_a_reduced_model_is_the_source_in_every_bit() -> None:
    h, source = random(4, WIDTH).bfloat16(), random(4, WIDTH, seed=1).bfloat16()
    assert torch.equal(run(h, Patch(source)), source)


def test_a_selected_row_without_a_source_is_refused() -> None:
    with pytest.raises(SteeringError, match="no source row for position 2; the source has 2 positions from 0 to 1"):
        run(random(4, WIDTH), Patch(random(2, WIDTH)))


def test_low_rank_maps_and_loreft() -> None:
    h = random(5, WIDTH)
    a, b, c = random(2, WIDTH, seed=1), random(2, seed=2), random(WIDTH, 2, seed=3)
    expected = h.double() + (h.double() @ a.double().T + b.double()) @ c.double().T
    torch.testing.assert_close(run(h, LowRank(a, b, c)).double(), expected, rtol=0, atol=1e-5)
    rotation = torch.linalg.qr(random(WIDTH, 2, seed=4).double())[0].T
    reft = h.double() + (h.double() @ a.double().T + b.double() - h.double() @ rotation.T) @ rotation
    torch.testing.assert_close(run(h, LowRank.loreft(rotation, a, b)).double(), reft, rtol=0, atol=1e-5)


def test_an_edit_is_any_function_of_the_rows() -> None:
    h = random(5, WIDTH)
    op = Edit(lambda x: x.flip(-1), name="flip")
    torch.testing.assert_close(run(h, op), h.flip(-1), rtol=0, atol=1e-6)
    assert torch.equal(run(h, op, positions="generated")[:4], h[:4])


def test_an_edit_has_no_digest_and_no_file(tmp_path: Any) -> None:
    steering = Steering({"embed": Edit(torch.relu, name="relu")})
    assert not steering.serialisable
    for action in (lambda: steering.digest, lambda: steering.save(tmp_path / "x.safetensors")):
        with pytest.raises(SteeringError, match="relu is Python code: it has no digest and cannot be saved or sent"):
            action()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: Patch(torch.eye(3), positions=[0, 1]), SteeringError, "3 source rows need 3 different positions"),
        (lambda: Patch(torch.eye(2), positions=[1, 1]), SteeringError, "2 different positions"),
        (lambda: Patch(torch.ones(3), positions=[1]), SteeringError, "this source is one vector"),
        (lambda: Patch(torch.ones(2, 2, 2)), VectorError, r"\[d\] or \[rows, d\] was expected"),
        (lambda: LowRank(torch.eye(3), None, torch.ones(2, 3)), VectorError, r"needs b \[3\] and B \[3, 3\]"),
        (lambda: LowRank(torch.eye(3), torch.ones(2), torch.eye(3)), VectorError, r"got b \[2\]"),
        (lambda: LowRank.loreft(torch.eye(3), torch.ones(2, 3), None), VectorError, "must have one shape"),
        (lambda: Edit("relu"), SteeringError, "a str was given where a function"),
        (
            lambda: run(torch.ones(2, 3), Edit(lambda x: x[:1])),
            SteeringError,
            r"returned \[1, 3\]; \[2, 3\] was expected",
        ),
        (lambda: run(torch.ones(2, 3), Edit(lambda x: None)), SteeringError, "returned NoneType"),
        (lambda: run(torch.ones(2, 3), Edit(lambda x: x / 0)), NonFiniteError, "0:Edit made 2 rows non-finite"),
    ],
)
def test_refusals(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()
