"""`LayerMath`: the formulas of one layer over a batch of directions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import InputError
from trimtab.weights.attention import ValueOutput, ValueProducts, mixed, qk, spread, vo, vo_products
from trimtab.weights.block import Block, Branch
from trimtab.weights.load import LayerWeights
from trimtab.weights.mlp import activate, mlp, neurons


class Response(NamedTuple):
    """What one matrix reads and gives when the stream is a batch of directions."""

    name: str
    inputs: Float[Tensor, "row in"]
    outputs: Float[Tensor, "row out"]


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

        Raises:
            InputError: the layer has no such matrix, or it reads a mixture of tokens.
        """
        x = self._block.rows(x)
        self._require([name])
        if name == "o":
            return mixed(self._block, x).flatten(1)
        prefix, _, last = name.rpartition(".")
        if last == "down":
            return neurons(self._block, f"{prefix}." if prefix else "", self._block.normed(x, "mlp"))
        return self._block.normed(x, _branch(name))

    def apply(self, name: str, inputs: Tensor) -> Float[Tensor, "row out"]:
        """Return the output of a matrix, with its bias, for rows of its own input space.

        Feed one model's `inputs` to two models' matrices to compare the matrices alone.
        """
        return self._block.linear(name, self._block.rows(inputs, self.weights.shape(name)[1]))

    def project(self, name: str, x: Tensor) -> Float[Tensor, "row out"]:
        """Return `apply(name, inputs(name, x))`: what the matrix makes of the stream `x`."""
        return self.apply(name, self.inputs(name, x))

    def responses(self, x: Tensor, names: Collection[str] | None = None) -> Iterator[Response]:
        """Yield `inputs` and `project` of every matrix, reading and multiplying each matrix once.

        Args:
            x: [n, d_model] rows of the stream.
            names: the matrices wanted, of `LayerMath.names`; None: all. What they read is computed in any case.

        Raises:
            InputError: the layer has no such matrix, or it reads a mixture of tokens.
        """
        wanted = self.names if names is None else names
        self._require(wanted)
        x = self._block.rows(x)
        yield from self._attention_responses(self._block.normed(x, "attn"), set(wanted))
        normed = self._block.normed(x, "mlp")
        for name in ("router", "shared.router"):
            if name in wanted:
                yield Response(name, normed, self._block.linear(name, normed))
        prefixes = dict.fromkeys(name.rpartition(".")[0] for name in self.names if name.endswith("down"))
        for prefix in prefixes:
            yield from self._mlp_responses(f"{prefix}." if prefix else "", normed, set(wanted))

    def qk(self, queries: Tensor, keys: Tensor, offset: int = 0) -> Float[Tensor, "head query key"]:
        """Return the attention logits before the softmax; see `trimtab.weights.attention.qk`."""
        return qk(self._block, self._block.rows(queries), self._block.rows(keys), offset)

    def vo(self, x: Tensor) -> ValueOutput:
        """Return what attention adds for rows that look at themselves only; see `trimtab.weights.attention.vo`."""
        return vo(self._block, self._block.rows(x))

    def vo_products(self, x: Tensor, probes: Tensor) -> ValueProducts:
        """Return the inner products of `vo(x)` with probes; see `trimtab.weights.attention.vo_products`."""
        return vo_products(self._block, self._block.rows(x), self._block.rows(probes))

    def _attention_responses(self, normed: Tensor, wanted: set[str]) -> Iterator[Response]:
        kept: dict[str, Tensor] = {}
        for name in self.names:
            if _branch(name) != "attn" or name == "o":
                continue
            needed = "o" in wanted and name in ("v", "q_gate")
            if name not in wanted and not needed:
                continue
            outputs = self._block.linear(name, normed)
            if needed:
                kept[name] = outputs
            if name in wanted:
                yield Response(name, normed, outputs)
        if "o" in wanted:
            inputs = spread(self._block, kept["v"], kept.get("q_gate")).flatten(1)
            yield Response("o", inputs, self._block.linear("o", inputs))

    def _mlp_responses(self, prefix: str, normed: Tensor, wanted: set[str]) -> Iterator[Response]:
        gate, up, down = (f"{prefix}{name}" for name in ("gate", "up", "down"))
        outputs: dict[str, Tensor] = {}
        for name in (gate, up):
            if name in self.weights and wanted & {name, down}:
                outputs[name] = self._block.linear(name, normed)
                if name in wanted:
                    yield Response(name, normed, outputs[name])
        if down in wanted:
            inputs = activate(self._block, outputs.get(gate), outputs[up])
            outputs.clear()
            yield Response(down, inputs, self._block.linear(down, inputs))

    def _require(self, names: Collection[str]) -> None:
        unknown = [name for name in names if name not in self.names]
        if unknown:
            why = "reads a mixture of tokens" if unknown[0] in self.weights else "does not exist"
            raise InputError(
                f"layer {self.weights.layer}: matrix {unknown[0]!r} {why}; directions can be sent through "
                f"{', '.join(self.names[:12])}{' ...' if len(self.names) > 12 else ''}"
            )


def _branch(name: str) -> Branch:
    return "attn" if name in ("q", "k", "v", "o", "q_gate") or name.startswith("linear.") else "mlp"
