"""The ops on one direction: their normal form in float64, their roundings in rational arithmetic, their refusals."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from steering_oracle import exact, rounded

from trimtab.errors import SteeringError, VectorError
from trimtab.steering import Ablate, Add, Cap, Op, SetProjection, SiteProgram, Steering
from trimtab.steering.program import Applied

WIDTH = 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MATHS = ["float32", "bfloat16", "float16", "model"]
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def program(*ops: Op, positions: Any = "all", gain: Any = 1.0, width: int = WIDTH) -> SiteProgram:
    bound = Steering({"layers.0.resid_post": list(ops)}, positions=positions, gain=gain)
    (site,) = bound.resolve(num_layers=1, hidden_size=width).values()
    return site


def run(h: torch.Tensor, *ops: Op, **options: Any) -> Applied:
    detail = options.pop("detail", "counts")
    site = program(*ops, width=h.shape[-1], **options)
    return site.apply(h, positions=torch.arange(h.shape[0]), prompt_length=1, detail=detail)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def make(kind: str, v: torch.Tensor, x: float, y: float, **options: Any) -> Op:
    low, high = sorted((x, y))
    return {
        "Add": lambda: Add(v, x, **options),
        "Cap": lambda: Cap(v, low, high, **options),
        "Ablate": lambda: Ablate(v, x, **options),
        "SetProjection": lambda: SetProjection(v, x, **options),
        "AddToken": lambda: Add(v, x, unit="token_norm", **options),
        "AddMedian": lambda: Add(v, x, unit="median_norm", median_norm=3.5, **options),
    }[kind]()


def normal_form(kind: str, h: np.ndarray, v: np.ndarray, x: float, y: float) -> np.ndarray:  # type: ignore[type-arg]
    """The correction of DESIGN's normal form, in float64, written without the package."""
    u = v / np.sqrt((v * v).sum())
    p = h @ u
    low, high = sorted((x, y))
    zero = np.zeros_like(p)
    k, b, lo, hi, a = {
        "Add": (1.0, 0.0, -np.inf, np.inf, zero[:, None] + x * v),
        "Cap": (1.0, 0.0, low, high, 0.0),
        "Ablate": (x, 0.0, -np.inf, np.inf, 0.0),
        "SetProjection": (0.0, x, -np.inf, np.inf, 0.0),
        "AddToken": (1.0, 0.0, -np.inf, np.inf, x * np.sqrt((h * h).sum(1))[:, None] * u),
        "AddMedian": (1.0, 0.0, -np.inf, np.inf, zero[:, None] + x * 3.5 * u),
    }[kind]
    return np.asarray(a + (np.clip(k * p + b, lo, hi) - p)[:, None] * u)


KINDS = ["Add", "Cap", "Ablate", "SetProjection", "AddToken", "AddMedian"]
numbers = st.floats(-4, 4, width=32).map(lambda x: float(np.float32(x)))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31), x=numbers, y=numbers, ratio=st.sampled_from([None, 0.05, 0.7, 100.0]))
def test_an_op_is_its_normal_form(kind: str, seed: int, x: float, y: float, ratio: float | None) -> None:
    h, v = random(4, WIDTH, seed=seed, scale=3.0), random(WIDTH, seed=seed + 1, scale=2.0)
    got = run(h, make(kind, v, x, y, max_ratio=ratio)).h.double().numpy()
    wide = h.double().numpy()
    c = normal_form(kind, wide, v.double().numpy(), x, y)
    if ratio is not None:
        size, bound = np.linalg.norm(c, axis=1), ratio * np.linalg.norm(wide, axis=1)
        c = c * np.where(size > bound, bound / np.maximum(size, 1e-300), 1.0)[:, None]
    # float32 roundings: a dot of WIDTH terms, a handful of products, one final sum
    scale = np.abs(wide).max() + np.abs(c).max() + np.abs(wide).sum(1).max()
    np.testing.assert_allclose(got, wide + c, rtol=0, atol=8 * EPS[torch.float32] * scale)


@pytest.mark.parametrize("math", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["Cap", "Ablate", "SetProjection", "AddToken", "AddMedian", "Add"])
@given(
    rows=st.lists(st.lists(st.integers(-12, 12), min_size=6, max_size=6), min_size=1, max_size=3),
    direction=st.lists(st.integers(-7, 7), min_size=6, max_size=6),
    x=numbers,
    y=numbers,
)
def test_reduced_math_rounds_where_it_says(
    math: str, kind: str, rows: list[list[int]], direction: list[int], x: float, y: float
) -> None:
    """Dot (summed in float32), clamp, subtract and multiply each round to the math dtype, once."""
    assume(any(direction))
    dtype = getattr(torch, math)
    h = torch.tensor(rows, dtype=dtype)
    op = make(kind, torch.tensor(direction).float(), x, y, math=math)
    stored = op.direction if hasattr(op, "direction") else op.vector.double() / op.vector.double().norm()
    u = exact(stored.float().to(dtype))

    def r(value: Fraction | float) -> Fraction:
        return rounded(Fraction(value), dtype)

    got = run(h, op).h
    for row, given_row in zip(got, rows, strict=True):
        state = [Fraction(one) for one in given_row]
        p = r(rounded(sum((a * b for a, b in zip(state, u, strict=True)), Fraction()), torch.float32))
        if kind.startswith("Add"):
            length = Fraction(float(torch.tensor(given_row, dtype=torch.float64).norm().float().to(dtype)))
            single = torch.tensor(direction).double()
            static = single * x if kind == "Add" else single / single.norm() * 3.5 * x
            fixed = exact(static.float().to(dtype))
            correction = [r(r(length * r(x)) * one) for one in u] if kind == "AddToken" else fixed
        else:
            low, high = sorted((r(x), r(y)))
            target = {"Cap": min(max(p, low), high), "Ablate": r(p * r(x)), "SetProjection": r(x)}[kind]
            correction = [r(r(target - p) * one) for one in u]
        expected = [r(rounded(a + c, torch.float32)) for a, c in zip(state, correction, strict=True)]
        assert exact(row) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("math", MATHS)
def test_ops_without_effect_change_no_bit(dtype: torch.dtype, math: Any) -> None:
    h = random(5, WIDTH, scale=2.0).to(dtype)
    h[0, :4], h[1] = -0.0, 0.0
    v = random(WIDTH, seed=3)
    v[::5] = 0.0
    for op in [
        Add(v, 0.0, math=math),
        Add(v, -0.0, unit="token_norm", math=math),
        Cap(v, -1e4, 1e4, math=math),
        Cap(v, max=1e4, math=math, max_ratio=0.5),
        Ablate(v, 1.0, math=math),
    ]:
        for positions in ("all", "generated"):
            assert torch.equal(bits(run(h, op, positions=positions).h), bits(h)), (op.describe(), positions)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_no_op_selects_keep_their_bits(dtype: torch.dtype) -> None:
    h = random(9, WIDTH, scale=2.0).to(dtype)
    h[2, :3] = -0.0
    ops = [
        Add(random(WIDTH, seed=1), 5.0),
        Cap(random(WIDTH, seed=2), max=-9.0),
        SetProjection(random(WIDTH, seed=3), 7.0),
    ]
    for op in ops:
        out = run(h, op, positions="3:5,8:").h
        kept, changed = [0, 1, 2, 5, 6, 7], [3, 4, 8]
        assert torch.equal(bits(out[kept]), bits(h[kept]))
        assert all(not torch.equal(out[i], h[i]) for i in changed)


def test_elements_that_the_correction_leaves_alone_keep_their_sign_of_zero() -> None:
    h = torch.tensor([[-0.0, 1.0], [-0.0, 2.0]])
    v = torch.tensor([0.0, 1.0])
    for op in (Add(v), Add(v, unit="token_norm"), Cap(v, max=0.5)):
        assert torch.equal(bits(run(h, op).h[:, 0]), bits(h[:, 0]))


@given(seed=st.integers(0, 2**31), low=numbers, high=numbers)
def test_after_a_cap_the_projection_is_inside_and_the_rest_is_untouched(seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    h, v = random(6, WIDTH, seed=seed, scale=4.0), random(WIDTH, seed=seed + 1)
    u = v.double() / v.double().norm()
    after = run(h, Cap(v, low, high)).h.double()
    slack = 64 * EPS[torch.float32] * float(h.abs().sum(1).max())
    assert bool(((after @ u >= low - slack) & (after @ u <= high + slack)).all())
    off = (after - h.double()) - ((after - h.double()) @ u)[:, None] * u
    assert float(off.abs().max()) <= slack


def test_ablation_scales_the_component_and_set_projection_pins_it() -> None:
    h, v = random(50, WIDTH, scale=3.0), random(WIDTH, seed=9)
    u = v.double() / v.double().norm()
    before = h.double() @ u
    for keep in (0.0, 0.25, 1.0, -1.0, 2.0):
        after = run(h, Ablate(v, keep)).h.double() @ u
        torch.testing.assert_close(after, keep * before, rtol=0, atol=1e-5)  # 24 float32 terms of size 3
    pinned = run(h, SetProjection(v, 2.5)).h.double() @ u
    torch.testing.assert_close(pinned, torch.full_like(pinned, 2.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("math", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_the_batch_it_is_in(math: Any) -> None:
    h, v = random(33, 257, scale=3.0), random(257, seed=1)
    ops = [
        Cap(v, max=0.1, math=math),
        Add(v, 0.3, unit="token_norm", math=math),
        Ablate(v, 0.3, max_ratio=0.1, math=math),
    ]
    together = run(h, *ops).h
    alone = torch.cat([run(row[None], *ops).h for row in h])
    assert torch.equal(together, alone)


def test_a_direction_is_normalised_once_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trimtab"):
        op = Cap(torch.tensor([3.0, 4.0]), max=1.0)
    assert "the norm given was 5" in caplog.text
    assert op.direction.tolist() == pytest.approx([0.6, 0.8])
    caplog.clear()
    with caplog.at_level(logging.INFO, "trimtab"):
        again = Cap(op.direction, max=1.0)
    assert not caplog.text
    assert torch.equal(again.direction, op.direction)


@given(st.integers(0, 2**31), st.integers(1, 400))
def test_normalising_twice_changes_no_bit(seed: int, width: int) -> None:
    once = Ablate(random(width, seed=seed, scale=37.0), 0.0).direction
    assert torch.equal(Ablate(once, 0.0).direction, once)


def test_vectors_may_be_tensors_arrays_lists_or_reduced_precision() -> None:
    reference = Add(torch.tensor([1.0, 2.5]))
    for given_vector in (np.array([1.0, 2.5]), [1.0, 2.5], torch.tensor([1.0, 2.5], dtype=torch.bfloat16)):
        assert Add(given_vector) == reference
    mine = torch.tensor([1.0, 2.5])
    op = Add(mine)
    mine.zero_()
    assert op == reference


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: Add([1.0, NAN]),
            VectorError,
            r"Add vector: 1 of 2 values are not finite in float32, the first at \[1\]",
        ),
        (lambda: Cap([INF, 1.0], max=1), VectorError, "Cap direction: 1 of 2 values are not finite"),
        (lambda: Add([1e39, 1.0]), VectorError, "not finite in float32"),
        (lambda: Add([0.0, 0.0]), VectorError, "the vector of width 2 is zero"),
        (lambda: Ablate([0.0], keep=0), VectorError, "is zero and has no direction"),
        (lambda: Add(torch.zeros(2, 2)), VectorError, r"shape \[2, 2\] was given; \[d\] was expected"),
        (lambda: Add([]), VectorError, r"shape \[0\] was given"),
        (lambda: Add(torch.tensor([True])), VectorError, "real numbers were expected"),
        (lambda: Add(torch.tensor([1j])), VectorError, "real numbers were expected"),
        (lambda: Add("abc"), VectorError, "Add vector"),
        (lambda: Add(None), VectorError, "Add vector"),
        (lambda: Cap([1.0]), SteeringError, "Cap has no bound: give min, max or both"),
        (lambda: Cap([1.0], min=2, max=1), SteeringError, "min=2 is above max=1"),
        (lambda: Cap([1.0], max=NAN), SteeringError, "Cap max: nan was given; a finite number"),
        (lambda: Cap([1.0], min=-INF), SteeringError, "Cap min: -inf was given"),
        (lambda: Cap([1.0], max="5"), SteeringError, "Cap max: '5' was given; a number was expected"),
        (lambda: Add([1.0], INF), SteeringError, "Add scale: inf"),
        (lambda: Add([1.0], unit="norms"), SteeringError, "expected one of absolute, token_norm, median_norm"),
        (lambda: Add([1.0], unit="median_norm"), SteeringError, "needs the median norm at its site and got None"),
        (lambda: Add([1.0], math="fp32"), SteeringError, "expected one of float32, bfloat16, float16, model"),
        (lambda: Add([1.0], max_ratio=0), SteeringError, "is above 0"),
        (lambda: Ablate([1.0], keep=NAN), SteeringError, "Ablate keep: nan"),
        (lambda: SetProjection([1.0], value=True), SteeringError, "a number was expected"),
    ],
)
def test_refusals_at_construction(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_keep_has_no_default() -> None:
    with pytest.raises(TypeError, match="keep"):
        Ablate([1.0])  # type: ignore[call-arg]
