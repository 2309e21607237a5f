"""AblateSubspace against least squares, CapSubspace against a quadratic program, and their refusals."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from trimtab.errors import SteeringError, VectorError
from trimtab.steering import Ablate, AblateSubspace, Cap, CapSubspace, Op, Steering
from trimtab.steering.program import Applied
from trimtab.steering.subspace import MANY_SWEEPS, SWEEPS

WIDTH = 16


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def run(h: torch.Tensor, op: Op) -> Applied:
    (site,) = Steering({"embed": op}).resolve(num_layers=1, hidden_size=h.shape[-1]).values()
    return site.apply(h, positions=torch.arange(len(h)), prompt_length=1, detail="full")


@given(seed=st.integers(0, 2**31), count=st.integers(1, 6), keep=st.sampled_from([0.0, 0.5, 1.0, -1.0]))
def test_ablation_scales_the_least_squares_fit(seed: int, count: int, keep: float) -> None:
    h, v = random(3, WIDTH, seed=seed, scale=3.0), random(count, WIDTH, seed=seed + 1)
    wide = v.double().T.numpy()
    fit = np.linalg.lstsq(wide, h.double().T.numpy(), rcond=None)[0]
    inside = torch.from_numpy((wide @ fit).T)
    got = run(h, AblateSubspace(v, keep)).h.double()
    # the basis is rounded to float32: 2^-24 per component, summed over the width and the directions
    torch.testing.assert_close(got, h.double() + (keep - 1) * inside, rtol=0, atol=2e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_dependent_directions_span_what_they_span(count: int) -> None:
    v = random(2, WIDTH, seed=4)
    listed = [v[0], v[1], v[0] * 2 - v[1]][: count + 1] if count == 2 else [v[0], -3 * v[0], v[0] * (1 + 1e-8)]
    op = AblateSubspace(listed, keep=0.0)
    assert op.rank == (2 if count == 2 else 1)
    h = random(4, WIDTH, seed=5)
    left = run(h, op).h.double()
    assert float((left @ torch.stack(listed).double().T).abs().max()) < 1e-5
    others = run(h, AblateSubspace(v[: op.rank], keep=0.0)).h
    torch.testing.assert_close(left.float(), others, rtol=0, atol=1e-5)


def test_strict_names_the_dependent_pair() -> None:
    v = random(3, WIDTH, seed=6)
    listed = [v[0], v[1], v[2], -2 * v[1]]
    with pytest.raises(
        SteeringError, match=r"4 directions span only 3 dimensions; closest are 1 and 3 with cosine -1\.0"
    ):
        AblateSubspace(listed, keep=0.0, strict=True)
    assert AblateSubspace(v, keep=0.0, strict=True).rank == 3


def test_one_direction_is_the_plain_op() -> None:
    h, v = random(6, WIDTH, scale=2.0), random(WIDTH, seed=1)
    torch.testing.assert_close(run(h, AblateSubspace([v], 0.2)).h, run(h, Ablate(v, 0.2)).h, rtol=0, atol=1e-6)
    for bounds in ({"max": 0.3}, {"min": 0.1}, {"min": -0.2, "max": 0.2}):
        single = run(h, Cap(v, **bounds)).h
        torch.testing.assert_close(run(h, CapSubspace([v], **bounds)).h, single, rtol=0, atol=1e-6)


def oracle(h: np.ndarray, u: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Least |d| with lo <= U (h + d) <= hi by SLSQP in the coordinates of the span."""
    basis = np.linalg.svd(u, full_matrices=False)[2]
    reduced, p = u @ basis.T, u @ h
    constraints = []
    for row, here, a, b in zip(reduced, p, low, high, strict=True):
        if np.isfinite(a):
            constraints.append(
                {"type": "ineq", "fun": lambda x, row=row, s=here - a: row @ x + s, "jac": lambda _, row=row: row}
            )
        if np.isfinite(b):
            constraints.append(
                {"type": "ineq", "fun": lambda x, row=row, s=b - here: s - row @ x, "jac": lambda _, row=row: -row}
            )
    done = minimize(
        lambda x: 0.5 * x @ x,
        np.zeros(len(basis)),
        jac=lambda x: x,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return np.asarray(done.x @ basis)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 8), shape=st.sampled_from(["max", "min", "both", "mixed"]))
def test_the_change_is_the_smallest_that_meets_all_bounds(seed: int, count: int, shape: str) -> None:
    h, v = random(2, WIDTH, seed=seed, scale=2.0), random(count, WIDTH, seed=seed + 1)
    draw = random(2, count, seed=seed + 2)
    low, high = (draw.amin(0) - 0.1).tolist(), (draw.amax(0) + 0.1).tolist()
    bounds: dict[str, Any] = {"min": low, "max": high}
    if shape == "mixed":
        bounds = {
            "min": [x if i % 3 != 0 else None for i, x in enumerate(low)],
            "max": [x if i % 3 != 1 else None for i, x in enumerate(high)],
        }
    elif shape != "both":
        bounds = {shape: bounds[shape]}
    op = CapSubspace(v, **bounds)
    applied = run(h, op)
    moved = applied.h.double().numpy() - h.double().numpy()
    u = op.directions.double().numpy()
    lo = np.array([-np.inf if one is None else one for one in op.min])
    hi = np.array([np.inf if one is None else one for one in op.max])
    after = applied.h.double().numpy() @ u.T
    violation = np.maximum(np.maximum(lo - after, after - hi), 0).max(1)
    reported = applied.dose[0].violation.double().numpy()
    # what the fixed number of sweeps leaves is reported; float32 sums of WIDTH terms of size 6 add 1e-5
    np.testing.assert_allclose(reported, violation, atol=1e-5)
    if float(np.linalg.cond(u @ u.T)) < 10:  # Hildreth converges linearly, by the condition of U U^T
        for row, got in zip(h.double().numpy(), moved, strict=True):
            np.testing.assert_allclose(got, oracle(row, u, lo, hi), atol=2e-4)


def test_two_directions_agree_with_the_exact_solution() -> None:
    """k = 2: the optimum has some set of active bounds; trying all of them in rationals' stead, float64, is exact."""
    u = CapSubspace(random(2, WIDTH, seed=3), max=0.0).directions.double().numpy()
    u[1] = u[0] * 0.8 + u[1] * 0.6
    op = CapSubspace(torch.from_numpy(u), min=[-0.3, -0.2], max=[0.1, 0.4])
    unit = op.directions.double().numpy()
    h = random(40, WIDTH, seed=8)
    got = run(h, op).h.double().numpy() - h.double().numpy()
    for row, change in zip(h.double().numpy(), got, strict=True):
        p, best = unit @ row, None
        for active in itertools.product([None, 0, 1], repeat=2):
            rows = [i for i, side in enumerate(active) if side is not None]
            goal = [(op.min, op.max)[side][i] - p[i] for i, side in enumerate(active) if side is not None]
            d = np.linalg.pinv(unit[rows]) @ np.array(goal) if rows else np.zeros(WIDTH)
            q = unit @ (row + d)
            fits = all(a - 1e-9 <= one <= b + 1e-9 for a, one, b in zip(op.min, q, op.max, strict=True))
            if fits and (best is None or d @ d < best @ best):
                best = d
        np.testing.assert_allclose(change, best, atol=2e-5)


def test_sequential_caps_break_a_bound_that_the_joint_cap_meets() -> None:
    u = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    h = torch.tensor([[4.0, 4.0]])
    bounds = {"min": [1.5, None], "max": [None, 1.0]}
    (site,) = (
        Steering({"embed": [Cap(u[0], min=1.5), Cap(u[1], max=1.0)]}).resolve(num_layers=1, hidden_size=2).values()
    )
    one_by_one = site.apply(h, positions=torch.tensor([0]), prompt_length=1).h
    joint = run(h, CapSubspace(u, **bounds)).h
    assert float(one_by_one[0] @ u[0]) < 1.5 - 0.1
    assert float(joint[0] @ u[0]) >= 1.5 - 1e-5
    assert float(joint[0] @ u[1]) <= 1.0 + 1e-5


def test_sweeps_are_fixed_by_the_condition_number_at_construction() -> None:
    tilted = torch.tensor([[1.0, 0.0], [0.97, 0.243]])  # cond = (1 + c) / (1 - c) = 65
    assert CapSubspace(tilted, max=1.0).sweeps == MANY_SWEEPS == 256
    assert CapSubspace(torch.tensor([[1.0, 0.0], [0.9, 0.436]]), max=1.0).sweeps == SWEEPS == 64


def test_inside_the_bounds_nothing_moves() -> None:
    h = random(3, WIDTH)
    applied = run(h, CapSubspace(random(3, WIDTH, seed=1), min=-1e3, max=1e3))
    assert torch.equal(applied.h.view(torch.int32), h.view(torch.int32))
    assert not applied.dose[0].clamped.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_math_meets_the_bounds_to_its_own_precision(dtype: torch.dtype) -> None:
    h = random(20, WIDTH, scale=2.0).to(dtype)
    applied = run(h, CapSubspace(random(3, WIDTH, seed=1), min=-0.5, max=0.5, math="model"))
    # a few roundings of projections of size up to 8
    slack = 4 * 8 * (2.0**-8 if dtype is torch.bfloat16 else 2.0**-11)
    assert float(applied.dose[0].violation.max()) <= slack
    directions = CapSubspace(random(3, WIDTH, seed=1), max=1.0).directions.double()
    assert float((applied.h.double() @ directions.T).abs().max()) <= 0.5 + slack


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: CapSubspace([[1.0, 0.0], [1.0, 0.0]], min=[1, None], max=[None, 0]),
            SteeringError,
            "no state can meet min=",
        ),
        (
            lambda: CapSubspace([[1.0, 0.0], [-2.0, 0.0]], min=1.0),
            SteeringError,
            r"closest are 0 and 1 with cosine -1\.0",
        ),
        (
            lambda: CapSubspace([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], max=[0.0, 0.0, None], min=[None, None, 1.0]),
            SteeringError,
            "no state can meet",
        ),
        (lambda: CapSubspace([[1.0, 0.0]], min=1, max=0), SteeringError, "direction 0: min=1 is above max=0"),
        (lambda: CapSubspace([[1.0, 0.0]]), SteeringError, "CapSubspace has no bound"),
        (lambda: CapSubspace(torch.eye(9), max=1.0), SteeringError, "at most 8 directions; 9 were given"),
        (lambda: CapSubspace(torch.eye(3), max=[1.0, 2.0]), SteeringError, "2 bounds were given for 3 directions"),
        (lambda: CapSubspace(torch.eye(2), max=[1.0, float("inf")]), SteeringError, r"max\[1\]: inf was given"),
        (lambda: CapSubspace([], max=1.0), SteeringError, "no direction was given"),
        (lambda: AblateSubspace([[1.0], [1.0, 2.0]], 0.0), SteeringError, "widths 1, 2 were given"),
        (
            lambda: AblateSubspace(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 0.0),
            VectorError,
            "row 1 the vector of width 2 is zero",
        ),
    ],
)
def test_refusals(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_compatible_bounds_on_dependent_directions_are_met() -> None:
    op = CapSubspace([[1.0, 0.0], [-1.0, 0.0]], max=[0.5, 0.25])
    out = run(torch.tensor([[3.0, 1.0], [-3.0, 1.0]]), op).h
    torch.testing.assert_close(out, torch.tensor([[0.5, 1.0], [-0.25, 1.0]]))
