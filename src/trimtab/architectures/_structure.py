"""Explain one decoder block from a recorded forward pass: what it adds to the stream, where, and through what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from trimtab.architectures._family import Sizes, fan
from trimtab.architectures._handle import Point
from trimtab.architectures._record import Call

_PASSING = ("Dropout", "Identity")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_SOFTMAX_INPUT = re.compile(r"^(q_proj|query|query_key_value|qkv_proj|qkv|c_attn|wqkv|wq|q_lin|in_proj)$", re.I)
_PROJECTIONS = {"q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value")}
_CLOSE = {torch.float32: 2e-5, torch.float64: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Largest deviation, relative to the largest entry, at which two tensors are taken for the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What was found out about one block."""

    points: dict[str, Point]
    missing: dict[str, str] = field(default_factory=dict)
    """Point -> why the block does not have it."""


@dataclass(frozen=True, slots=True)
class _Sum:
    """A pair of contributions and the factor with which both are added."""

    first: Call
    second: Call
    scale: float


def explain(block: Call, calls: Sequence[Call], sizes: Sizes, scales: Sequence[float]) -> Structure:
    """Find the points of one block.

    Args:
        block: the block's own call.
        calls: every call inside it.
        sizes: of the model.
        scales: factors that the configuration mentions, tried as residual multipliers.
    """
    assert block.input is not None and block.output is not None
    width = block.output.shape[-1]
    points = {
        "resid_pre": Point(path="", side="input", width=width, fragile=block.mutated("input")),
        "resid_post": Point(path="", width=width, fragile=block.mutated("output")),
    }
    children = [call for call in calls if "." not in call.path[len(block.path) + 1 :]]
    parts = _find_sum(block, children, scales)
    if parts is None:
        reason = "no two of its modules add up to what it changes; use resid_pre and resid_post"
        return Structure(points=points, missing=dict.fromkeys(("attn_out", "mlp_out", "resid_mid", *_INSIDE), reason))
    attn, mlp = _name_parts(parts, children)
    raws = {"attn": _raw(attn, children), "mlp": _raw(mlp, children)}
    for name, part in (("attn", attn), ("mlp", mlp)):
        points[f"{name}_raw"] = _output_point(raws[name], block, 1.0)
        points[f"{name}_out"] = _output_point(part, block, parts.scale)
    missing: dict[str, str] = {}
    mid = _find_mid(block, children, parts)
    if mid is None:
        missing["resid_mid"] = "no module receives the sum of the stream and one branch; use attn_out or mlp_out"
    else:
        path = mid.path[len(block.path) + 1 :]
        points["resid_mid"] = Point(path=path, side="input", in_place=True, width=width)
    points.update(_inside(block, calls, raws, sizes))
    return Structure(points=points, missing=missing)


_INSIDE = ("attn_raw", "mlp_raw", "mlp_act", "attn_z", "q", "k", "v")


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree up to the rounding of their dtype."""
    if torch.equal(found, expected):
        return True
    bound = _CLOSE.get(found.dtype, 2e-5) * expected.abs().max()
    return bool((found.double() - expected.double()).abs().max() <= bound)


def _find_sum(block: Call, children: Sequence[Call], scales: Sequence[float]) -> _Sum | None:
    """The two children whose outputs make the difference between the block's output and its input."""
    assert block.input is not None and block.output is not None
    pre, post = block.input, block.output
    able = [call for call in children if _may_add(call, block)]
    pairs = [(one, two, shaped(one, pre), shaped(two, pre)) for one, two in combinations(able, 2)]
    for scale in (1.0, *scales):
        for one, two, a, b in pairs:
            if any(torch.equal(total, post) for total in _orders(pre, a, b, scale)):
                return _Sum(one, two, scale)
    if pre.dtype in (torch.float32, torch.float64):  # in coarser dtypes a small third term would pass as rounding
        for one, two, a, b in pairs:
            if same(pre + a + b, post):
                return _Sum(one, two, 1.0)
    return None


def _orders(pre: Tensor, a: Tensor, b: Tensor, scale: float) -> Iterator[Tensor]:
    """The sum in every order of rounding that blocks use."""
    if scale != 1.0:
        a, b = a * scale, b * scale
    yield pre + a + b
    yield a + b + pre
    yield pre + b + a


def _may_add(call: Call, block: Call) -> bool:
    assert block.input is not None
    if call.output is None or not call.output.is_floating_point() or type(call.module).__name__ in _PASSING:
        return False
    return call.output.numel() == block.input.numel() and call.output.shape[-1] == block.input.shape[-1]


def _name_parts(parts: _Sum, children: Sequence[Call]) -> tuple[Call, Call]:
    """Attention and MLP among two contributions: by name where only one sounds like attention, else by order."""
    attention = [bool(_ATTENTION.search(_full_name(_raw(call, children)))) for call in (parts.first, parts.second)]
    if attention == [False, True]:
        return parts.second, parts.first
    return parts.first, parts.second


def _full_name(call: Call) -> str:
    return f"{call.path.rpartition('.')[2]} {type(call.module).__name__}"


def _raw(part: Call, children: Sequence[Call]) -> Call:
    """The branch behind a contribution: itself, or what ran before it when it is only a norm."""
    weight = getattr(part.module, "weight", None)
    if not part.leaf or (isinstance(weight, Tensor) and weight.ndim > 1):
        return part
    before = [call for call in children if call.end < part.begin and not call.leaf]
    return max(before, key=lambda call: call.end, default=part)


def _output_point(part: Call, block: Call, scale: float) -> Point:
    assert part.output is not None and block.output is not None
    return Point(
        path=part.path[len(block.path) + 1 :],
        width=part.output.shape[-1],
        scale=scale,
        flat=part.output.ndim < block.output.ndim,
        fragile=part.mutated("output"),
    )


def _find_mid(block: Call, children: Sequence[Call], parts: _Sum) -> Call | None:
    """The first child that receives the stream with one contribution in it."""
    assert block.input is not None
    first = shaped(parts.first, block.input)
    expected = block.input + (first * parts.scale if parts.scale != 1.0 else first)
    for call in children:
        received = call.input
        if received is None or received.shape != expected.shape or call.begin < parts.first.end:
            continue
        if same(received, expected):
            return call
    return None


def _inside(block: Call, calls: Sequence[Call], raws: dict[str, Call], sizes: Sizes) -> dict[str, Point]:
    """attn_z and mlp_act (what enters the projection that ends a branch) and separate q, k, v projections."""
    found: dict[str, Point] = {}
    below = {name: [call for call in calls if call.path.startswith(raw.path + ".")] for name, raw in raws.items()}
    for name, point in (("attn", "attn_z"), ("mlp", "mlp_act")):
        last = _last_projection(raws[name], below[name] or [raws[name]])
        if last is not None and last.input is not None and last.input.ndim == 3:
            path = last.path[len(block.path) + 1 :]
            found[point] = Point(path=path, side="input", width=last.input.shape[-1])
    leaves = {call.path.rpartition(".")[2]: call for call in below["attn"] if call.leaf}
    if not any(_SOFTMAX_INPUT.match(name) for name in leaves):
        found.pop("attn_z", None)
    for point, names in _PROJECTIONS.items():
        heads = sizes.heads if point == "q" else sizes.kv_heads
        for name in names:
            call = leaves.get(name)
            if call is not None and call.output is not None and call.output.shape[-1] == heads * sizes.head_dim:
                found[point] = Point(path=call.path[len(block.path) + 1 :], width=call.output.shape[-1])
    return found


def _last_projection(raw: Call, inside: Sequence[Call]) -> Call | None:
    """The matrix product whose result is the branch's output."""
    for call in sorted(inside, key=lambda call: -call.end):
        weight = getattr(call.module, "weight", None)
        if call.leaf and isinstance(weight, Tensor) and weight.ndim == 2 and call.output is not None:
            ends = raw.output is not None and torch.equal(call.output, raw.output)
            return call if ends and fan(call.module)[1] == call.output.shape[-1] else None
    return None


def shaped(call: Call, like: Tensor) -> Tensor:
    """Return a call's output in the shape of the stream."""
    assert call.output is not None
    return call.output.reshape(like.shape)
