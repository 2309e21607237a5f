"""The MLP of a block: dense or a mixture of experts, gated or not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.architectures import activation
from trimtab.weights.block import Block


class Routing(NamedTuple):
    """Which experts each row goes to."""

    experts: Tensor
    """[row, top_k], int64."""
    weights: Tensor
    """[row, top_k]: factor on the expert's output, or on its input (`sigmoid_input`)."""


def mlp(block: Block, x: Tensor) -> Tensor:
    """Return what the MLP branch adds to the stream for rows of the stream, [n, d] -> [n, d].

    `post_norm(down(act(gate x') * up x'))` with `x' = norm(x)`; a mixture of experts adds the outputs of the experts
    that its router chooses for each row, and its shared expert.
    """
    return block.norm("mlp_post_norm", raw_mlp(block, block.normed(x, "mlp")))


def raw_mlp(block: Block, normed: Tensor) -> Tensor:
    """Return the MLP's output for rows that went through its input norm, before any output norm."""
    if block.weights.router is None:
        return block.linear("down", neurons(block, "", normed))
    out = _experts(block, normed, route(block, normed))
    if "shared.down" in block.weights:
        shared = block.linear("shared.down", neurons(block, "shared.", normed))
        if "shared.router" in block.weights:
            shared *= torch.sigmoid(block.linear("shared.router", normed))
        out += shared
    return out


def neurons(block: Block, prefix: str, normed: Tensor) -> Tensor:
    """Return what the down projection reads, [n, intermediate].

    Args:
        block: the layer.
        prefix: "" for a dense MLP, "shared." or "experts.3." for one expert.
        normed: rows that went through the input norm.
    """
    gate = block.linear(f"{prefix}gate", normed) if f"{prefix}gate" in block.weights else None
    return activate(block, gate, block.linear(f"{prefix}up", normed))


def activate(block: Block, gate: Tensor | None, up: Tensor) -> Tensor:
    """Return `act(gate) * up`, or `act(up)` without a gate."""
    act = activation(block.numerics.activation)
    return act(up) if gate is None else act(gate) * up


def route(block: Block, normed: Tensor) -> Routing:
    """Return the experts of every row and their weights."""
    router = block.weights.router
    assert router is not None
    logits = block.linear("router", normed)
    if router.form == "sigmoid_input":
        values, experts = logits.topk(router.top_k, dim=-1)
        return Routing(experts, torch.sigmoid(values))
    weights, experts = logits.softmax(-1).topk(router.top_k, dim=-1)
    if router.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights)


def _experts(block: Block, normed: Tensor, routing: Routing) -> Tensor:
    assert block.weights.router is not None
    scale_input = block.weights.router.form == "sigmoid_input"
    out = torch.zeros_like(normed)
    for expert in torch.unique(routing.experts).tolist():
        row, place = (routing.experts == expert).nonzero(as_tuple=True)
        factor = routing.weights[row, place, None]
        chosen = normed[row] * factor if scale_input else normed[row]
        given = block.linear(f"experts.{expert}.down", neurons(block, f"experts.{expert}.", chosen))
        out.index_add_(0, row, given if scale_input else given * factor)
    return out
