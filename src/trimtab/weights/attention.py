"""Attention of a block read through directions: query-key affinity and value-output, head by head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.architectures import Rope, Rotary
from trimtab.errors import InputError
from trimtab.weights.block import Block, require, rms_factor


class ValueOutput(NamedTuple):
    """What attention adds to the stream when it looks at one token only. `heads.sum(0) + rest == total`."""

    heads: Float[Tensor, "head row d_model"]
    rest: Float[Tensor, "row d_model"]
    """What belongs to no head: the output projection's bias; zeros where there is none."""
    total: Float[Tensor, "row d_model"]


class ValueProducts(NamedTuple):
    """`ValueOutput` read along probe directions: inner products and lengths, without the outputs themselves."""

    heads: Float[Tensor, "head row probe"]
    head_norms: Float[Tensor, "head row"]
    total: Float[Tensor, "row probe"]
    """Of the total, which is more than the sum of the heads where the output projection has a bias."""
    total_norms: Float[Tensor, row]


def qk(block: Block, queries: Tensor, keys: Tensor, offset: int = 0) -> Float[Tensor, "head query key"]:
    """Return the attention logits before the softmax, of every query row for every key row.

    `softcap(scale * rope(q_norm(Wq norm(x)), offset) . rope(k_norm(Wk norm(y)), 0))`, each part where the family has
    it. Windows and masks are left out: a query further away than a window reaches is still answered.

    Args:
        block: the layer.
        queries: [n, d] rows of the stream.
        keys: [m, d] rows of the stream.
        offset: tokens from the key to the query, 0 or more.

    Raises:
        InputError: the layer has no softmax attention, or the offset is negative.
    """
    require(("q", "k"), block.weights)
    if offset < 0:
        raise InputError(f"offset {offset}: a query cannot come before its key; 0 or more was expected")
    sizes, numerics = block.weights.sizes, block.numerics
    table = block.weights.rotary(offset + 1)
    q = _heads(block, "q", block.normed(queries, "attn"), table, offset)
    k = _heads(block, "k", block.normed(keys, "attn"), table, 0)
    scale = numerics.attention_scale
    if numerics.temperature is not None:
        scale *= numerics.temperature.factor(offset)
    q = (q * scale).view(len(q), sizes.kv_heads, -1, sizes.head_dim)
    scores = torch.einsum("nghd,mgd->ghnm", q, k).flatten(0, 1)
    if numerics.attention_softcap is not None:
        scores = scores.div_(numerics.attention_softcap).tanh_().mul_(numerics.attention_softcap)
    return scores


def _heads(block: Block, name: str, normed: Tensor, table: Rotary | None, position: int) -> Tensor:
    """Return q or k after its norm and rotation, [n, heads, head_dim]."""
    flat = block.linear(name, normed)
    form = block.numerics.qk_norm
    if form == "full_width":
        flat = block.norm(f"{name}_norm", flat)
    heads = flat.view(len(flat), -1, block.weights.sizes.head_dim)
    if form == "per_head":
        heads = block.norm(f"{name}_norm", heads)
    if table is not None and block.numerics.rope is not None:
        heads = rotate(heads, block.numerics.rope, table, position)
    if form == "l2":
        heads = heads * rms_factor(heads, block.numerics.norm_eps)
    return heads


def rotate(x: Float[Tensor, "*row head_dim"], rope: Rope, table: Rotary, position: int) -> Tensor:
    """Rotate the first dimensions of every head as at `position`."""
    angles = table.frequencies.to(x.device, torch.float64) * position
    cos, sin = ((part * table.factor).to(x.dtype) for part in (angles.cos(), angles.sin()))
    width = 2 * len(angles)
    turned, kept = x[..., :width], x[..., width:]
    if rope.pairing == "interleaved":
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, kept), -1)


def mixed(block: Block, x: Tensor) -> Float[Tensor, "row head head_dim"]:
    """Return what the output projection reads when each row looks at itself only: its values, per query head, gated."""
    require(("v", "o"), block.weights)
    normed = block.normed(x, "attn")
    gate = block.linear("q_gate", normed) if "q_gate" in block.weights else None
    return spread(block, block.linear("v", normed), gate)


def spread(block: Block, values: Tensor, gate: Tensor | None) -> Float[Tensor, "row head head_dim"]:
    """Return the values of every query head, times the sigmoid of its gate where the family has one (Qwen3-Next)."""
    sizes = block.weights.sizes
    heads = values.view(len(values), sizes.kv_heads, -1).repeat_interleave(sizes.heads // sizes.kv_heads, dim=1)
    return heads if gate is None else heads * torch.sigmoid(gate).view_as(heads)


def vo(block: Block, x: Tensor) -> ValueOutput:
    """Return what attention adds to the stream for rows that look at themselves only, head by head.

    Where the family norms the sum (Gemma 2 and 3, OLMo 2) every head is scaled by the norm factor of the sum and by the
    norm's weight, so that the heads still add up to the total.
    """
    z, out = mixed(block, x), _output_heads(block)
    heads = torch.bmm(z.transpose(0, 1), out.mT)
    bias = block.bias("o")
    rest = torch.zeros_like(heads[0]) if bias is None else bias.expand_as(heads[0])
    total = heads.sum(0) + rest
    if "attn_post_norm" in block.weights:
        factor = rms_factor(total, block.numerics.norm_eps) * block.gain("attn_post_norm")
        return ValueOutput(heads.mul_(factor), rest * factor, total * factor)
    return ValueOutput(heads, rest, total)


def vo_products(block: Block, x: Tensor, probes: Tensor) -> ValueProducts:
    """Return the inner products of `vo(x)` with probes, head by head, holding one head's output at a time.

    Takes the probes back through the output projection once, so the cost per pair of direction and probe is that of a
    head's width, not of the stream's.
    """
    z, out = mixed(block, x), _output_heads(block)
    gain = block.gain("attn_post_norm") if "attn_post_norm" in block.weights else None
    weighted = probes if gain is None else probes * gain
    bias = block.bias("o")
    total = torch.zeros_like(x) if bias is None else bias.expand_as(x).clone()
    products = x.new_empty(len(out), len(x), len(probes))
    norms = x.new_empty(len(out), len(x))
    for head, matrix in enumerate(out):
        one = z[:, head] @ matrix.T
        total += one
        norms[head] = torch.linalg.vector_norm(one if gain is None else one * gain, dim=-1)
        torch.mm(z[:, head], (weighted @ matrix).T, out=products[head])
    if gain is not None:
        factor = rms_factor(total, block.numerics.norm_eps)
        total *= factor * gain
        products *= factor
        norms *= factor[:, 0]
    return ValueProducts(products, norms, total @ probes.T, torch.linalg.vector_norm(total, dim=-1))


def _output_heads(block: Block) -> Float[Tensor, "head d_model head_dim"]:
    """Return the output projection by head, a view of its columns."""
    matrix = block.matrix("o")
    return matrix.reshape(len(matrix), block.weights.sizes.heads, -1).transpose(0, 1)
