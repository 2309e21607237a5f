"""The parts that every formula is made of: norms, and matrices applied in the dtype asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.architectures import Numerics
from trimtab.errors import InputError
from trimtab.numerics.dtypes import dtype_name, resolve_dtype
from trimtab.weights.load import LayerWeights

Branch = Literal["attn", "mlp"]
_PIECE = 1 << 19
"""Elements that are cast at a time: 2 MB of float32."""


class Block:
    """One layer's weights, applied to rows in one dtype on one device. Each call reads and casts what it needs."""

    def __init__(self, weights: LayerWeights, dtype: torch.dtype | str, device: torch.device | str = "cpu") -> None:
        self.weights = weights
        self.numerics: Numerics = weights.numerics
        self.dtype = resolve_dtype(dtype)
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(f"formulas are computed in float32 or float64, not in {dtype_name(self.dtype)}")
        self.device = torch.device(device)

    def rows(self, x: Tensor, width: int | None = None) -> Tensor:
        """Return `x` in the block's dtype and on its device.

        Raises:
            InputError: not [n, width].
        """
        width = self.weights.sizes.hidden if width is None else width
        if x.ndim != 2 or x.shape[1] != width:
            raise InputError(f"rows of shape {tuple(x.shape)} for layer {self.weights.layer}; [n, {width}] is expected")
        return x.to(self.device, self.dtype)

    def matrix(self, name: str) -> Tensor:
        """Return a matrix, [out, in], in the block's dtype."""
        return self.weights.matrix(name).to(self.device, self.dtype)

    def bias(self, name: str) -> Tensor | None:
        """Return the bias of a matrix, [out], in the block's dtype; None where it has none."""
        bias = self.weights.bias(name)
        return None if bias is None else bias.to(self.device, self.dtype)

    def linear(self, name: str, x: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """Return `x W^T + b`; on the CPU a matrix that must be cast is cast a piece at a time."""
        stored, bias = self.weights.matrix(name), self.bias(name)
        if stored.dtype == self.dtype or self.device.type != "cpu":
            return torch.nn.functional.linear(x, stored.to(self.device, self.dtype), bias)
        out = x.new_empty(len(x), len(stored))
        step = max(1, _PIECE // stored.shape[1])
        for start in range(0, len(stored), step):
            rows = slice(start, start + step)
            torch.mm(x, stored[rows].to(self.dtype).T, out=out[:, rows])
        return out if bias is None else out.add_(bias)

    def gain(self, name: str) -> Tensor:
        """Return what a norm multiplies by, [width]: w, or 1 + w where the family stores it so."""
        weight = self.weights.norm(name).to(self.device, self.dtype)
        return 1 + weight if self.numerics.norm == "rmsnorm_plus_one" else weight

    def norm(self, name: str, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """Apply a norm of the layer over the last dimension; one that the layer does not have changes nothing."""
        if name not in self.weights:
            return x
        if self.numerics.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
        normed = x * rms_factor(x, self.numerics.norm_eps) * self.gain(name)
        bias = self.bias(name)
        return normed if bias is None else normed + bias

    def normed(self, x: Tensor, branch: Branch) -> Tensor:
        """Return the rows as a branch of the block reads them: through its input norm, where it has one."""
        return self.norm(f"{branch}_norm", x)


def rms_factor(x: Float[Tensor, "*row width"], eps: float) -> Float[Tensor, "*row 1"]:
    """Return 1 / sqrt(mean(x^2) + eps) over the last dimension, summed in float64."""
    square = x.to(torch.float64).square().mean(-1, keepdim=True)
    return torch.rsqrt(square + eps).to(x.dtype)


def require(names: Sequence[str], weights: LayerWeights) -> None:
    """Refuse a layer that lacks one of the matrices.

    Raises:
        InputError: names what is missing.
    """
    missing = [name for name in names if name not in weights]
    if missing:
        raise InputError(f"layer {weights.layer} has no {', '.join(missing)}; it has: {', '.join(weights.names[:12])}")
