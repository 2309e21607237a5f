"""Whether a layer is whole: every matrix that its family has, in the shape that its configuration states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from trimtab.architectures import Sizes
from trimtab.errors import InputError
from trimtab.weights._layout import VECTORS, Finder, Piece


def require_whole(finder: Finder, layer: int, path: Path) -> None:
    """Refuse a layer that lacks a tensor, or that its configuration does not describe.

    Raises:
        InputError: names the first few.
    """
    pieces = finder.layer(layer)
    problems = [f"{name} is missing" for name in _expected(finder, pieces, layer) if name not in pieces]
    problems = problems or [
        *_missing_biases(finder, pieces),
        *_wrong_shapes(finder, pieces),
        *_left_over(finder, pieces),
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"layer {layer} of {path} is not whole: {'; '.join(problems[:4])}{more}")


def _linear(finder: Finder, layer: int) -> bool:
    if finder.family.block(finder.config).linear_attn is None:
        return False
    return bool(finder.config.layer_types[layer] == "linear_attention")


def _expected(finder: Finder, pieces: Mapping[str, Piece], layer: int) -> Iterator[str]:
    linear = _linear(finder, layer)
    for name in VECTORS:
        if name in finder.disk.layers and not (linear and name in ("q_norm", "k_norm")):
            yield name
    if linear:
        yield from (f"linear.{name}" for name in ("q", "k", "v", "z", "b", "a", "o"))
    else:
        yield from ("q", "k", "v", "o")
    gated = any(role in finder.disk.layers for role in ("gate", "gate_up", "expert_gate", "experts_gate_up"))
    parts = ("gate", "up", "down") if gated else ("up", "down")
    router = finder.family.router(finder.config)
    if router is None or not any(name == "router" or name.startswith("experts.") for name in pieces):
        yield from parts
        return
    yield "router"
    yield from (f"experts.{expert}.{part}" for expert in range(router.num_experts) for part in parts)
    for role in ("shared_gate", "shared_up", "shared_down", "shared_router"):
        if role in finder.disk.layers:
            yield role.replace("_", ".")


def _missing_biases(finder: Finder, pieces: Mapping[str, Piece]) -> Iterator[str]:
    for name in dict.fromkeys(piece.bias for piece in pieces.values() if piece.bias):
        if name not in finder.shapes:
            yield f"{name} is missing"


def _wrong_shapes(finder: Finder, pieces: Mapping[str, Piece]) -> Iterator[str]:
    sizes, shapes = Sizes.of(finder.config), finder.shapes
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    known = {"q": (q, sizes.hidden), "k": (kv, sizes.hidden), "v": (kv, sizes.hidden), "o": (sizes.hidden, q)}
    for name, piece in pieces.items():
        shape = piece.shape(shapes[piece.tensor])
        if name in VECTORS:
            expected: tuple[int, ...] = shape if name in ("q_norm", "k_norm") else (sizes.hidden,)
        elif name.endswith("down"):
            expected = (sizes.hidden, *_rows_of_up(name, pieces, finder))
        else:
            expected = known.get(name, (shape[0], shape[1] if name == "linear.o" else sizes.hidden))
        if shape != expected:
            yield f"{piece.tensor} gives a {name} of {list(shape)}, its configuration states {list(expected)}"


def _left_over(finder: Finder, pieces: Mapping[str, Piece]) -> Iterator[str]:
    """Name fused tensors of which no piece takes some rows: they would have been cut in the wrong places."""
    taken: Counter[tuple[str, int | None]] = Counter()
    whole: dict[tuple[str, int | None], int] = {}
    for piece in pieces.values():
        key, stored = (piece.tensor, piece.expert), finder.shapes[piece.tensor]
        taken[key] += piece.shape(stored)[0]
        whole[key] = replace(piece, groups=1, start=0, stop=None).shape(stored)[0]
    for key, rows in whole.items():
        if taken[key] != rows:
            yield f"{key[0]} has {rows} rows, its configuration states {taken[key]}"


def _rows_of_up(name: str, pieces: Mapping[str, Piece], finder: Finder) -> tuple[int, ...]:
    """Return the rows of the up projection beside a down projection."""
    up = pieces[f"{name.removesuffix('down')}up"]
    return up.shape(finder.shapes[up.tensor])[:1]
