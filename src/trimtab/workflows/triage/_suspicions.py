"""Kinds of mistakes that a change in the source may be, read from the syntax trees before and after it."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from trimtab.results.triage import Suspicion
from trimtab.workflows.triage._git import RawHunk

_DTYPE_WORDS = re.compile(r"\b(b?float\d*\w*|half|double|bf16|fp\d+|int\d+|dtype|type_as)\b")
_CALLS = {
    "dtype": {"float", "half", "bfloat16", "double", "type", "type_as", "autocast", "astype", "set_default_dtype"},
    "layout": {
        "transpose",
        "permute",
        "reshape",
        "view",
        "flatten",
        "unflatten",
        "swapaxes",
        "swapdims",
        "movedim",
        "rearrange",
        "t",
        "chunk",
        "split",
        "unbind",
        "repeat_interleave",
        "roll",
        "expand",
        "einsum",
    },
    "contiguity": {"contiguous", "as_strided", "clone", "is_contiguous"},
    "routing": {
        "topk",
        "argsort",
        "scatter",
        "scatter_",
        "scatter_add",
        "scatter_add_",
        "gather",
        "index_add_",
        "one_hot",
    },
    "norm": {"rsqrt", "layer_norm", "rms_norm", "LayerNorm", "RMSNorm", "var", "group_norm"},
    "activation": {"gelu", "silu", "relu", "tanh", "sigmoid", "softmax", "GELU", "SiLU", "ReLU", "softplus"},
    "mask": {"masked_fill", "masked_fill_", "tril", "triu", "tril_", "triu_"},
    "reduction": {"all_reduce", "reduce_scatter", "all_gather", "reduce_scatter_tensor", "all_gather_into_tensor"},
    "weight tying": {"tie_weights", "_tie_weights"},
}
_NAMES = {
    "routing": re.compile(r"(?i)router|expert|topk|top_k"),
    "norm": re.compile(r"(?i)eps(?:ilon)?$|(?:^|_)norm\w*$"),
    "rotary": re.compile(r"(?i)rope|rotary|inv_freq|theta|rotate_half|^base$"),
    "scale": re.compile(r"(?i)scal(?:e|ing)|head_dim|^sqrt$"),
    "mask": re.compile(r"(?i)mask|is_causal"),
    "bias": re.compile(r"(?i)bias$"),
    "weight tying": re.compile(r"(?i)^tie_|tied"),
    "activation": re.compile(r"^approximate$"),
    "residual": re.compile(r"(?i)residual|shortcut"),
}
FITTING = {
    "scale": ("scale", "reduction"),
    "double_reduction": ("reduction", "scale"),
    "missing_reduction": ("reduction", "scale"),
    "sign": ("sign", "rotary"),
    "transpose": ("layout", "contiguity"),
    "permutation": ("layout", "contiguity", "routing"),
    "shift": ("layout", "mask", "rotary"),
    "row_scale": ("norm",),
    "attention": ("scale", "rotary", "mask", "dtype"),
    "mask_edge": ("mask",),
    "coarse_rounding": ("dtype", "cast order"),
    "coarse_arithmetic": ("dtype", "cast order"),
    "residual": ("residual",),
    "activation": ("activation",),
    "missing_bias": ("bias",),
    "bad_shard": ("layout", "reduction"),
    "zero_rows": ("mask", "routing"),
    "routing": ("routing",),
    "stale_step": ("weight tying",),
    "nan_rows": ("mask", "norm"),
}
"""Which changes can make which fingerprint."""


class _Feature(NamedTuple):
    kind: str
    text: str
    line: int


def find_suspicions(hunk: RawHunk, old: str, new: str) -> tuple[Suspicion, ...]:
    """Return what a hunk removed or added that belongs to a known kind of mistake.

    Args:
        hunk: the change.
        old: the whole file before it.
        new: the whole file after it.
    """
    removed, added = hunk.changed()
    sides = (_by_line(old), _by_line(new))
    if sides[0] is None or sides[1] is None:
        return ()
    before = list(_features(sides[0], removed))
    after = list(_features(sides[1], added))
    gone = _only(before, after)
    come = _only(after, before)
    found = [(one, "removed") for one in gone] + [(one, "added") for one in come]
    if not any(one.kind == "dtype" for one, _ in found):
        found += [(one, "added") for one in after if one.kind == "dtype"][:1]  # casts as before, other code around them
        found = [(one._replace(kind="cast order") if one.kind == "dtype" else one, side) for one, side in found]
    return tuple(
        dict.fromkeys(
            Suspicion(kind=one.kind, line=one.line, side=side, code=one.text)  # type: ignore[arg-type]
            for one, side in found
        )
    )


def _only(these: list[_Feature], others: list[_Feature]) -> list[_Feature]:
    """Features of one side that the other does not have as often."""
    left = Counter((one.kind, one.text) for one in others)
    only = []
    for one in these:
        if left[one.kind, one.text] > 0:
            left[one.kind, one.text] -= 1
        else:
            only.append(one)
    return only


_Node = ast.expr | ast.keyword | ast.Assign | ast.arg
_Nodes = dict[int, list[tuple[int, _Node]]]


@functools.lru_cache(maxsize=4)
def _by_line(text: str) -> _Nodes | None:
    """The nodes of a file by their line, each with its place in the walk; None for what is no Python.

    A file that changed in many places is asked for once for each of them.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    found: _Nodes = {}
    for place, node in enumerate(ast.walk(tree)):
        if isinstance(node, _Node):
            found.setdefault(node.lineno, []).append((place, node))
    return found


def _features(nodes: _Nodes, lines: set[int]) -> Iterator[_Feature]:
    chosen = sorted((one for line in lines for one in nodes.get(line, ())), key=lambda one: one[0])
    for _, node in chosen:
        for kind, text in _kinds(node):
            yield _Feature(kind, text, node.lineno)


def _kinds(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Call):
        yield from _call(node)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT", "H"):
        yield "layout", f".{node.attr}"
    elif isinstance(node, ast.BinOp):
        text = ast.unparse(node)
        if isinstance(node.op, ast.Mult | ast.Div | ast.Pow) and _scales(node):
            yield "scale", text
        if isinstance(node.op, ast.Add) and not any(isinstance(one, ast.Constant) for one in (node.left, node.right)):
            yield "residual", text
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "sign", ast.unparse(node)
    elif isinstance(node, ast.keyword) and node.arg is not None:
        yield from ((kind, ast.unparse(node)) for kind, names in _NAMES.items() if names.search(node.arg))
        if node.arg == "dtype":
            yield "dtype", ast.unparse(node)
    elif isinstance(node, ast.Assign):
        yield from _assignment(node)
    elif isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        yield from (
            (kind, ast.unparse(node)) for kind, names in _NAMES.items() if names.search(name) and kind != "scale"
        )


def _call(node: ast.Call) -> Iterator[tuple[str, str]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    arguments = ", ".join(ast.unparse(one) for one in (*node.args, *node.keywords))
    text = f"{'.' * isinstance(node.func, ast.Attribute)}{name}({arguments})"
    for kind, names in _CALLS.items():
        if name in names:
            yield kind, text
    if name == "to" and _DTYPE_WORDS.search(arguments):
        yield "dtype", text
    if name == "sqrt":
        yield "scale", text


def _scales(node: ast.BinOp) -> bool:
    parts = [one for side in (node.left, node.right) for one in ast.walk(side)]
    names = [
        one.id if isinstance(one, ast.Name) else one.attr for one in parts if isinstance(one, ast.Name | ast.Attribute)
    ]
    constant = any(_is_float(one) for one in (node.left, node.right))
    return constant or any(_NAMES["scale"].search(name) for name in names)


def _is_float(node: ast.expr) -> bool:
    """Whether it is a number with a point, with or without a sign."""
    bare = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(bare, ast.Constant) and isinstance(bare.value, float)


def _assignment(node: ast.Assign) -> Iterator[tuple[str, str]]:
    targets = [one for one in node.targets if isinstance(one, ast.Attribute)]
    text = ast.unparse(node)
    if (
        isinstance(node.value, ast.Attribute)
        and node.value.attr == "weight"
        and any(one.attr == "weight" for one in targets)
    ):
        yield "weight tying", text
    names = [one.attr for one in targets] + [one.id for one in node.targets if isinstance(one, ast.Name)]
    yield from ((kind, text) for kind in ("scale", "rotary", "norm") if any(_NAMES[kind].search(one) for one in names))
