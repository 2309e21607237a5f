"""The fused pieces against separate forms, the smoothed loss, and plain autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.sae import fused
from trimtab.sae._threads import kernels

E = 0.2
WIDE = torch.float64


class Step(torch.autograd.Function):
    """Heaviside with the rectangle kernel's gradient for its threshold; as published."""

    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(pre, theta)
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < E / 2).to(pre.dtype)
        return torch.zeros_like(pre), -(near / E * grad).sum(0)


class JumpReLU(torch.autograd.Function):
    """pre above theta, with its threshold's gradient; as published."""

    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(pre, theta)
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < E / 2).to(pre.dtype)
        return (pre > theta) * grad, -(theta / E * near * grad).sum(0)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(200, 9, generator=generator, dtype=WIDE)
    theta = torch.rand(9, generator=generator, dtype=WIDE) * 0.5 + 0.05
    return pre, theta, torch.randn(200, 9, generator=generator, dtype=WIDE), 0.37


def gradients(pre: Tensor, theta: Tensor, weights: Tensor, counted: float, *, to_input: bool) -> tuple[Tensor, Tensor]:
    pre, theta = pre.clone().requires_grad_(), theta.clone().requires_grad_()
    z, count = fused.jump(pre, theta, E, to_input=to_input)
    assert count.requires_grad and z.requires_grad
    ((z * weights).sum() + counted * count).backward()
    assert pre.grad is not None and theta.grad is not None
    return pre.grad, theta.grad


def test_the_jump_is_the_separate_functions() -> None:
    pre, theta, weights, counted = drawn()
    mine = gradients(pre, theta, weights, counted, to_input=False)
    p, t = pre.clone().requires_grad_(), theta.clone().requires_grad_()
    ((JumpReLU.apply(p, t) * weights).sum() + counted * Step.apply(p, t).sum()).backward()
    assert torch.equal(mine[0], p.grad) and torch.allclose(mine[1], t.grad, rtol=1e-13, atol=1e-13)
    assert mine[0].any() and mine[1].all()
    z, count = fused.jump(pre, theta, E)
    assert torch.equal(z, pre * (pre > theta)) and float(count) == int((pre > theta).sum())


def smoothed(pre: Tensor, theta: Tensor, weights: Tensor, counted: float) -> Tensor:
    """The loss whose derivative for theta the kernel's is, exactly.

    A step from theta - E/2 to theta + E/2 becomes a ramp: L0 counts clamp((pre - theta) / E + 1/2, 0, 1), and z is
    the integral over t > theta of (t / E) 1[|pre - t| < E/2].
    """
    ramp = ((pre - theta) / E + 0.5).clamp(0, 1)
    z = ((pre + E / 2) ** 2 - torch.maximum(theta.expand_as(pre), pre - E / 2) ** 2) / (2 * E)
    return (torch.where(theta < pre + E / 2, z, 0) * weights).sum() + counted * ramp.sum()


def test_the_threshold_gradient_is_a_finite_difference_of_the_smoothed_loss() -> None:
    pre, theta, weights, counted = drawn(3)
    mine = gradients(pre, theta, weights, counted, to_input=False)[1]
    h = 1e-7
    for i in range(len(theta)):
        moved = torch.zeros_like(theta)
        moved[i] = h
        up, down = (smoothed(pre, theta + sign * moved, weights, counted) for sign in (1, -1))
        assert float(mine[i]) == pytest.approx(float(up - down) / (2 * h), rel=1e-5, abs=1e-5)


def test_to_the_input_the_jump_is_that_of_the_threshold_turned_round() -> None:
    """z - z(theta = -inf) and L0 depend on pre - theta near the threshold, so both gradients cancel there."""
    pre, theta, weights, counted = drawn(5)
    with_input = gradients(pre, theta, weights, counted, to_input=True)
    without = gradients(pre, theta, weights, counted, to_input=False)
    assert torch.equal(with_input[1], without[1])
    assert torch.allclose((with_input[0] - without[0]).sum(0), -without[1], rtol=1e-12, atol=1e-12)
    far = (pre - theta).abs() >= E / 2
    assert torch.equal(with_input[0][far], without[0][far])


def test_encode_and_decode_are_plain_autograd() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (30, 8), "w": (12, 8), "b": (12,), "o": (8,), "d": (12, 5), "g": (30, 12), "y": (30, 5)}
    t = {name: torch.randn(shape, generator=generator, dtype=WIDE) for name, shape in shapes.items()}
    mine = {name: t[name].clone().requires_grad_() for name in "wbod"}
    plain = {name: t[name].clone().requires_grad_() for name in "wbod"}
    pre = fused.encode(t["x"], mine["o"], mine["w"], mine["b"], mine["w"].detach())
    reference = (t["x"] - plain["o"]) @ plain["w"].t() + plain["b"]
    y = fused.decode(torch.relu(pre), mine["d"], mine["d"].detach(), WIDE)
    wanted = torch.relu(reference) @ plain["d"]
    assert torch.allclose(pre, reference, atol=1e-13) and torch.allclose(y, wanted, atol=1e-13)
    ((y * t["y"]).sum() + (pre * t["g"]).sum()).backward()
    ((wanted * t["y"]).sum() + (reference * t["g"]).sum()).backward()
    for name in "wbod":
        assert torch.allclose(mine[name].grad, plain[name].grad, atol=1e-12), name


def test_encode_without_bias_or_centre_gives_none_gradients() -> None:
    x, w = torch.ones(2, 3, dtype=WIDE), torch.ones(4, 3, dtype=WIDE, requires_grad=True)
    fused.encode(x, None, w, None, w.detach()).sum().backward()
    assert torch.equal(w.grad, torch.full((4, 3), 2.0, dtype=WIDE))


def test_float16_products_accumulate_in_float32() -> None:
    """4096 times 1 + 2^-11 is lost by a float16 accumulator at 2048."""
    left = torch.full((1, 4096), 1.0, dtype=torch.float16)
    right = torch.full((4096, 1), 1.0, dtype=torch.float16)
    assert float(fused.matmul(left, right)) == 4096.0
    assert fused.matmul(left, right).dtype == torch.float16
    assert torch.isinf(fused.matmul(left * 100, right * 100)).all()


def test_the_largest_of_a_row_do_not_depend_on_what_memory_held() -> None:
    pre = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    cols, counts = np.zeros((4, 3), np.int32), np.zeros(4, np.int64)
    for held in (0.0, np.nan, np.inf):
        values = np.full((4, 3), held, np.float32)
        kernels().top_of_rows(pre, np.zeros(32, np.float32), np.ones(32, np.bool_), 3, cols, values, counts, 0, 4)
        assert counts.tolist() == [3] * 4
        assert np.sort(values, axis=1).tolist() == np.sort(pre, axis=1)[:, -3:].tolist()
