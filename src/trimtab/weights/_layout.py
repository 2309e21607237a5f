"""Where each matrix of a layer lies in the files: fused, stacked and transposed tensors are taken apart here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trimtab.architectures import Disk, Family, Sizes

VECTORS = ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "q_norm", "k_norm")
_RENAMED = {
    "shared_gate": "shared.gate",
    "shared_up": "shared.up",
    "shared_down": "shared.down",
    "shared_router": "shared.router",
    "linear_o": "linear.o",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One matrix or vector inside a stored tensor."""

    tensor: str
    """Name in the files."""
    bias: str | None = None
    """Name of the bias of the whole stored tensor; None: it has none."""
    expert: int | None = None
    transposed: bool = False
    """Stored [in, out]."""
    groups: int = 1
    """The output rows are seen as [groups, size]; the piece is `start` to `stop` of every group."""
    start: int = 0
    stop: int | None = None

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the piece's shape, given that of the stored tensor."""
        if self.expert is not None:
            stored = stored[1:]
        rows, *rest = reversed(stored) if self.transposed else stored
        return (self.groups * len(range(rows // self.groups)[self.start : self.stop]), *rest)

    def cut(self, stored: Tensor) -> Tensor:
        """Return the piece of the stored tensor, [out, in]; a view where memory allows one."""
        if self.expert is not None:
            stored = stored[self.expert]
        return self.cut_rows(stored.T if self.transposed else stored)

    def cut_rows(self, stored: Tensor) -> Tensor:
        """Return the piece's rows of a tensor whose first dimension is the output."""
        if self.groups == 1:
            return stored[self.start : self.stop]
        grouped = stored.reshape(self.groups, -1, *stored.shape[1:])[:, self.start : self.stop]
        return grouped.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Finder:
    """The names of one checkpoint: family, configurations, and the shape of every stored tensor."""

    family: Family
    disk: Disk
    config: Any
    """Of the text decoder."""
    prefix: str
    """What stands before every name of the decoder in these files."""
    shapes: Mapping[str, tuple[int, ...]]

    def layer(self, layer: int) -> dict[str, Piece]:
        """Return the pieces of one layer by name, for those that the files hold."""
        pieces: dict[str, Piece] = {}
        biased = self.family.biased(self.config)
        for role, template in (*self.disk.stacked.items(), *self.disk.layers.items()):
            if "{expert}" in template:
                pieces.update(self._one_by_one(role, template, layer))
                continue
            name = self.prefix + template.format(layer=layer)
            if name not in self.shapes:
                continue
            bias = f"{name.removesuffix('weight')}bias" if role in biased else None
            turned = self.disk.transposed and role not in VECTORS
            pieces.update(self._split(role, Piece(tensor=name, bias=bias, transposed=turned)))
        return pieces

    def _one_by_one(self, role: str, template: str, layer: int) -> Iterator[tuple[str, Piece]]:
        router = self.family.router(self.config)
        for expert in range(router.num_experts if router else 0):
            name = self.prefix + template.format(layer=layer, expert=expert)
            if name in self.shapes:
                yield f"experts.{expert}.{role.removeprefix('expert_')}", Piece(tensor=name)

    def _split(self, role: str, whole: Piece) -> Iterator[tuple[str, Piece]]:
        rows = self.shapes[whole.tensor][-1 if whole.transposed else 0]
        if role == "qkv":
            yield from self._fused_attention(whole)
        elif role == "q" and self.family.block(self.config).qkv == "gated":
            dim = rows // (2 * Sizes.of(self.config).heads)
            yield from _ranges(whole, {"q": dim, "q_gate": dim}, groups=Sizes.of(self.config).heads)
        elif role == "gate_up":
            yield from _ranges(whole, {"gate": rows // 2, "up": rows // 2})
        elif role in ("experts_gate_up", "experts_down"):
            yield from self._stacked(role, whole)
        elif role in ("linear_qkvz", "linear_ba"):
            yield from self._linear(role, whole)
        else:
            yield _RENAMED.get(role, role), whole

    def _fused_attention(self, whole: Piece) -> Iterator[tuple[str, Piece]]:
        sizes = Sizes.of(self.config)
        if self.family.block(self.config).qkv == "fused_per_head":
            return _ranges(whole, dict.fromkeys("qkv", sizes.head_dim), groups=sizes.heads)
        kv = sizes.kv_heads * sizes.head_dim
        return _ranges(whole, {"q": sizes.heads * sizes.head_dim, "k": kv, "v": kv})

    def _stacked(self, role: str, whole: Piece) -> Iterator[tuple[str, Piece]]:
        experts, first, second = self.shapes[whole.tensor]
        reads_hidden = role == "experts_gate_up"
        told = (first == self.config.hidden_size) == reads_hidden
        turned = self.disk.experts_transposed if first == second else told
        rows = second if turned else first
        for expert in range(experts):
            one = replace(whole, expert=expert, transposed=turned)
            if role == "experts_down":
                yield f"experts.{expert}.down", one
            else:
                names = {f"experts.{expert}.gate": rows // 2, f"experts.{expert}.up": rows // 2}
                yield from _ranges(one, names)

    def _linear(self, role: str, whole: Piece) -> Iterator[tuple[str, Piece]]:
        """Take apart the projections of a gated delta rule: one group of rows per key head."""
        config = self.config
        heads = config.linear_num_key_heads
        ratio = config.linear_num_value_heads // heads
        key, value = config.linear_key_head_dim, ratio * config.linear_value_head_dim
        if role == "linear_qkvz":
            widths = {"linear.q": key, "linear.k": key, "linear.v": value, "linear.z": value}
        else:
            widths = {"linear.b": ratio, "linear.a": ratio}
        return _ranges(whole, widths, groups=heads)


def _ranges(whole: Piece, widths: Mapping[str, int], groups: int = 1) -> Iterator[tuple[str, Piece]]:
    start = 0
    for name, width in widths.items():
        yield name, replace(whole, groups=groups, start=start, stop=start + width)
        start += width
