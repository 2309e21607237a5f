"""One record of a foreign dump, while its index is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.trace.foreign._layout import File
from trimtab.trace.foreign._sglang import Tags


@dataclass(kw_only=True, slots=True, eq=False)
class Row:
    """What becomes one row of the index."""

    file: File
    tags: Tags
    phase: str
    inner: str
    """Place inside the value, where that is a container."""
    site: str | None = None
    name: str = ""
    kind: str = "value"
    layer: int | None = None
    rank: int = 0
    step: int = 0
    micro_step: int = 0
    call_index: int = 0
    dtype: str | None = None
    shape: list[int] | None = None
    shard: str | None = None
    key: str | None = None
    forward: Row | None = None
    """Of a gradient: the call that it belongs to, where that is known."""

    @property
    def extra(self) -> dict[str, str]:
        """Tags of the caller; a gradient lost those of its forward call."""
        return (self.forward or self).tags.extra

    @property
    def full_name(self) -> str:
        """The name with the tags of the caller, which tell records apart."""
        extra = ",".join(f"{key}={value}" for key, value in sorted(self.extra.items()))
        return f"{self.name}[{extra}]" if extra else self.name

    @property
    def identity(self) -> tuple[Any, ...]:
        """What must be equal for two records to be two calls of one thing."""
        place = (self.phase, self.step, self.micro_step, self.rank)
        return (*place, self.site, self.full_name, self.layer, self.kind, self.tags.recompute)

    def columns(self) -> dict[str, Any]:
        """The columns of the format that are known."""
        module = (self.site or self.name).removeprefix("module:").rpartition(".")[0]
        is_module = (self.site or self.name).startswith("module:")
        name = self.full_name
        return {
            "phase": self.phase,
            "step": self.step,
            "micro_step": self.micro_step,
            "rank": self.rank,
            **self.tags.ranks,
            "site": None if self.extra else self.site,
            "layer": self.layer,
            "name": name,
            "call_index": self.call_index,
            "edit": "none",
            "config": "",
            "dims": self.tags.dims,
            "dtype": self.dtype,
            "shape": self.shape if self.shape is not None else [],
            "kind": self.kind,
            "module_path": module if is_module and self.site else None,
            "recompute": self.tags.recompute,
            "shard": self.shard,
            "key": self.key,
        }
