"""`LayerMath`: the formulas of one layer over a batch of directions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.weights.attention import ValueOutput, mixed, qk, vo
from trimtab.weights.block import Block, Branch
from trimtab.weights.load import LayerWeights
from trimtab.weights.mlp import mlp, neurons


class LayerMath:
    """What one layer does with rows of the residual stream, matrix by matrix and branch by branch.

    Every function takes [n, d_model] rows of any float dtype and computes in `dtype`; the rows may have any length
    (families without an input norm feel it).

    Args:
        weights: of one layer.
        dtype: "float32" or "float64".
        device: where to compute.

    Example:
        >>> math = LayerMath(checkpoint.layer(3), "float32")
        >>> math.mlp(directions).shape, math.qk(directions, directions).shape
        (torch.Size([50, 1024]), torch.Size([16, 50, 50]))
    """

    def __init__(
        self,
        weights: LayerWeights,
        dtype: torch.dtype | str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        self._block = Block(weights, dtype, device)
        self.weights = weights

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices that a direction can be sent through: all but the output of a gated delta rule."""
        return tuple(name for name in self.weights.names if name != "linear.o")

    def normed(self, x: Tensor, which: Branch) -> Float[Tensor, "row d_model"]:
        """Return the rows as the attention ("attn") or MLP ("mlp") branch reads them."""
        return self._block.normed(self._block.rows(x), which)

    def mlp(self, x: Tensor) -> Float[Tensor, "row d_model"]:
        """Return what the MLP branch adds to the stream."""
        return mlp(self._block, self._block.rows(x))

    def inputs(self, name: str, x: Tensor) -> Float[Tensor, "row in"]:
        """Return what a matrix reads when the stream is `x`.

        q, k, v, gate, up and router read the rows through their branch's input norm; o reads the values of a token that
        looks at itself only; down reads the neurons. Experts are asked as if the router had chosen them with weight 1.
        """
        x = self._block.rows(x)
        if name == "o":
            return mixed(self._block, x).flatten(1)
        prefix, _, last = name.rpartition(".")
        if last == "down":
            return neurons(self._block, f"{prefix}." if prefix else "", self._block.normed(x, "mlp"))
        branch: Branch = "attn" if name in ("q", "k", "v", "q_gate") or prefix == "linear" else "mlp"
        return self._block.normed(x, branch)

    def apply(self, name: str, inputs: Tensor) -> Float[Tensor, "row out"]:
        """Return the output of a matrix, with its bias, for rows of its own input space.

        Feed one model's `inputs` to two models' matrices to compare the matrices alone.
        """
        return self._block.linear(name, self._block.rows(inputs, self.weights.shape(name)[1]))

    def project(self, name: str, x: Tensor) -> Float[Tensor, "row out"]:
        """Return `apply(name, inputs(name, x))`: what the matrix makes of the stream `x`."""
        return self.apply(name, self.inputs(name, x))

    def qk(self, queries: Tensor, keys: Tensor, offset: int = 0) -> Float[Tensor, "head query key"]:
        """Return the attention logits before the softmax; see `trimtab.weights.attention.qk`."""
        return qk(self._block, self._block.rows(queries), self._block.rows(keys), offset)

    def vo(self, x: Tensor) -> ValueOutput:
        """Return what attention adds for rows that look at themselves only; see `trimtab.weights.attention.vo`."""
        return vo(self._block, self._block.rows(x))
