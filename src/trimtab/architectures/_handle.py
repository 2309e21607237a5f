"""Where one site lives in a module tree, and how its tensor is cut out of what the module passes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.sites import Site

Side = Literal["input", "output", "logits"]


@dataclass(frozen=True, slots=True)
class Columns:
    """A slice of a fused projection, repeated once per group (per head when the layout interleaves heads).

    The last dimension is seen as [groups, size]; the slice is `[..., start:stop]` of each group, laid out flat.
    """

    groups: int
    start: int
    stop: int

    def cut(self, fused: Tensor) -> Tensor:
        """Return the slice of a [..., groups * size] tensor as [..., groups * (stop - start)]."""
        return self._grouped(fused.contiguous())[..., self.start : self.stop].flatten(-2)

    def paste(self, fused: Tensor, part: Tensor) -> Tensor:
        """Return a copy of `fused` whose slice is `part`; everything else keeps its bits."""
        merged = fused.clone(memory_format=torch.contiguous_format)
        self._grouped(merged)[..., self.start : self.stop] = self._grouped(part.contiguous())
        return merged

    def _grouped(self, tensor: Tensor) -> Tensor:
        return tensor.view(*tensor.shape[:-1], self.groups, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Where a point of a block is found, relative to that block."""

    path: str
    """Module path from the block; "" is the block itself."""
    side: Side = "output"
    columns: Columns | None = None
    scale: float = 1.0
    """The block adds `scale` times the module's output (Granite: residual_multiplier)."""
    in_place: bool = False
    """Written into the tensor itself, because nothing returns it (`resid_mid`)."""
    fragile: bool = False
    """The framework changes the tensor afterwards: visitors get copies (Falcon's mlp_out)."""
    flat: bool = False
    """The module returns [batch * sequence, width] (Llama 4's MoE)."""
    width: int
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Handle:
    """One site of one model: the module, the side of it, and the arithmetic between module tensor and site tensor.

    The site tensor is [batch, sequence, width]. `read` and `put` work on the module's tensor; finding that tensor in
    tuples, keyword arguments and output objects is the business of `trimtab.hooks`.
    """

    site: Site
    module_path: str
    """Dotted path from the model; "" is the model itself."""
    side: Side
    width: int
    columns: Columns | None = None
    scale: float = 1.0
    in_place: bool = False
    fragile: bool = False
    flat: bool = False
    note: str = ""

    @property
    def plain(self) -> bool:
        """Whether the module's tensor is the site's tensor, so that `read` and `put` change nothing."""
        return self.columns is None and self.scale == 1.0 and not self.flat

    def read(self, raw: Tensor, leading: tuple[int, ...] | None = None) -> Tensor:
        """Return the site's tensor.

        Args:
            raw: the module's tensor.
            leading: batch and sequence length, needed where the module flattens them.
        """
        if self.columns is not None:
            return self.columns.cut(raw)
        if self.flat and leading is not None:
            raw = raw.reshape(*leading, raw.shape[-1])
        return raw * self.scale if self.scale != 1.0 else raw

    def put(self, raw: Tensor, value: Tensor) -> Tensor:
        """Return what the module must pass on so that the site reads `value`; the shape of `raw` is kept.

        Rows in which `value` equals what `read` gave keep their bits: under a scale only the difference is divided.
        """
        if self.columns is not None:
            return self.columns.paste(raw, value)
        value = value.reshape(raw.shape)
        if self.scale == 1.0:
            return value
        change = value - raw * self.scale
        return torch.where(change == 0, raw, raw + change / self.scale)

    @classmethod
    def of_point(cls, site: Site, block_path: str, point: Point) -> Handle:
        """Bind a block's point to a site."""
        return cls(
            site=site,
            module_path=f"{block_path}.{point.path}" if point.path else block_path,
            side=point.side,
            width=point.width,
            columns=point.columns,
            scale=point.scale,
            in_place=point.in_place,
            fragile=point.fragile,
            flat=point.flat,
            note=point.note,
        )
