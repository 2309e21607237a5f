"""The three fused pieces of every autoencoder: encode, jump, decode. Each is one autograd Function.

    encode   pre = (x - b_dec) W_enc^T + b_enc      no gradient to x; that of b_dec is reduced before it is multiplied
    jump     z = pre 1[pre > theta], L0 = sum 1[pre > theta]                      the mask is recomputed, not stored
    decode   y = z W_dec

Weights are latent-major: W_enc [d_sae, d_in], W_dec [d_sae, d_out]. Products run on low-precision copies and give
low-precision results; sums over the batch for biases and thresholds are in the wide dtype.

Gradients of the jump, with K(u) = 1[|u| < 1/2] and bandwidth e (Rajamanoharan et al. 2024, and the product rule):

    dz/dpre = m (+ (theta / e) K with the straight-through gradient to the input)      dz/dtheta  = -(theta / e) K
    dL0/dpre = 0 (+ (1 / e) K with it)                                                 dL0/dtheta = -(1 / e) K
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` with float32 accumulation, in the operands' dtype.

    CPUs have no float16 products to speak of: there operands are widened, which is exact, and the result is rounded.
    """
    if left.dtype == torch.float16 and left.device.type == "cpu":
        return (left.float() @ right.float()).to(torch.float16)
    return left @ right


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b_dec: Tensor | None, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
        centred = (x if b_dec is None else x - b_dec.to(x.dtype)).to(low.dtype)
        pre = matmul(centred, low.t())
        if bias is not None:
            pre = pre.add_(bias.to(pre.dtype)) if pre.dtype == x.dtype else (pre + bias.to(x.dtype)).to(pre.dtype)
        ctx.save_for_backward(centred, low)
        ctx.dtypes = (
            None if b_dec is None else b_dec.dtype,
            weight.dtype,
            None if bias is None else bias.dtype,
            x.dtype,
        )
        return pre

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        centred, low = ctx.saved_tensors
        of_centre, of_weight, of_bias, wide = ctx.dtypes
        sums = grad.sum(0, dtype=wide) if of_centre is not None or of_bias is not None else None
        weight = matmul(grad.to(low.dtype).t(), centred).to(of_weight)
        bias = None if of_bias is None or sums is None else sums.to(of_bias)
        centre = None if of_centre is None or sums is None else -(sums @ low.to(wide)).to(of_centre)
        return None, centre, weight, bias, None


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, low: Tensor, wide: torch.dtype) -> Tensor:
        narrow = z.to(low.dtype)
        ctx.save_for_backward(narrow, low)
        ctx.dtypes = (z.dtype, weight.dtype)
        return matmul(narrow, low).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, low = ctx.saved_tensors
        of_z, of_weight = ctx.dtypes
        grad = grads[0].to(low.dtype)
        latents = matmul(grad, low.t()).to(of_z) if ctx.needs_input_grad[0] else None
        weight = matmul(z.t(), grad).to(of_weight) if ctx.needs_input_grad[1] else None
        return latents, weight, None, None


class _Jump(Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        mask = pre > threshold
        return torch.where(mask, pre, 0), mask.sum().to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, counted = grads
        pre, threshold = ctx.saved_tensors
        wide = threshold.dtype
        near = (pre.to(wide) - threshold).abs() < ctx.bandwidth / 2
        jump = torch.where(near, (threshold * grad.to(wide) + counted) / ctx.bandwidth, 0)
        of_pre = torch.where(pre > threshold, grad, 0)
        if ctx.to_input:
            of_pre = (of_pre.to(wide) + jump).to(pre.dtype)
        return of_pre, -jump.sum(0), None, None


def encode(x: Tensor, b_dec: Tensor | None, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
    """Return pre-activations [batch, d_sae] in the dtype of `low`.

    Args:
        x: [batch, d_in], wide, in stored units; it gets no gradient.
        b_dec: [d_in], subtracted from x; None: nothing is.
        weight: [d_sae, d_in], the parameter that gets the gradient.
        bias: [d_sae].
        low: the copy of `weight` that the product is made with.
    """
    result: Tensor = _Encode.apply(x, b_dec, weight, bias, low)  # type: ignore[no-untyped-call]
    return result


def decode(z: Tensor, weight: Tensor, low: Tensor, wide: torch.dtype) -> Tensor:
    """Return what latents write [batch, d_out], wide, in stored units, without the bias.

    Args:
        z: [batch, latents], times the activation multiplier.
        weight: [latents, d_out], the parameter that gets the gradient.
        low: the copy of `weight` that the product is made with.
        wide: dtype of the result.
    """
    result: Tensor = _Decode.apply(z, weight, low, wide)  # type: ignore[no-untyped-call]
    return result


def jump(pre: Tensor, threshold: Tensor, bandwidth: float, *, to_input: bool = False) -> tuple[Tensor, Tensor]:
    """Return the activated latents and how many they are, with the straight-through gradients of the module's head.

    Args:
        pre: [batch, d_sae].
        threshold: [d_sae], wide, positive.
        bandwidth: width of the rectangle kernel, in the units of `pre`.
        to_input: let the gradient of the jump reach `pre` too.

    Returns:
        z [batch, d_sae] in the dtype of `pre`, and the number of active latents in the batch, wide, a scalar; both have
        gradients.
    """
    z, count = _Jump.apply(pre, threshold, bandwidth, to_input)  # type: ignore[no-untyped-call]
    return z, count
