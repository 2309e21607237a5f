"""Taps of tensors that a graph compiled for the CPU does not store, but computes where they are read (`Tap.fused`).

To store one would part what stock vLLM fuses, and round what it does not round. So the tensor is made again beside the
graph, the tap acts on that, and the graph takes from it the elements that were changed: all others keep stock's bits.

torch.compile stores a tensor that is used twice once more than `realize_reads_threshold` tensors are read for it, and
sums a row up in another order where it is stored. So the graph must store what stock's does: the changes of a norm are
one tensor more, for which the threshold is raised (`READS`); those of what enters the first block are one more too, and
the rows of the embedding are one less than ids and table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.backends.vllm import op
from trimtab.backends.vllm.live import LiveTap
from trimtab.backends.vllm.step import Step

READS = {"realize_reads_threshold": 5}
"""Option of Inductor for a graph that reads the changes of norms; 4 is its default."""
_PROBED = 64


def correct_norm(norm: nn.Module, live: LiveTap, name: str, step: Step) -> None:
    """Have the output of a norm corrected by its tap.

    Args:
        norm: it becomes an instance of a subclass of its own class.
        live: the tap.
        name: by which graphs find it.
        step: the tables of the pass.
    """
    stock, changed = taken_over(norm), op.changed
    native = getattr(type(norm), "forward_native", stock)

    def changes(x: Tensor | None) -> Tensor | None:
        assert x is not None
        if not step.active:
            return None
        before: Tensor = native(norm, x.reshape(-1, x.shape[-1])[: step.rows.n])
        after = before.clone()
        op.site_(after, name)
        return torch.where(after == before, torch.nan, after)

    def forward(self: nn.Module, x: Tensor) -> Any:
        made = changed(x, name)
        return torch.where(made == made, made, stock(self, x))

    live.beside = changes
    norm.__class__ = subclass(type(norm), forward, stock)


class Entry:
    """Makes what enters the first block, before the graph runs.

    Args:
        acting: "output" and "input" -> name of the tap of what is embedded, and of what enters the block.
        positions: gives what is added to the embedded rows in between; None: nothing is.
    """

    def __init__(self, acting: Mapping[str, str], positions: Callable[[], Tensor] | None) -> None:
        self._acting = acting
        self._positions = positions
        self._changes: Tensor | None = None

    def __call__(self, embedded: Tensor) -> Tensor:
        """Return what enters, of what is embedded, [rows, width]."""
        stock, rows = embedded, self._acted("output", embedded)
        if self._positions is not None:
            added = self._positions()[: len(rows)]
            stock, rows = stock + added, rows + added
        rows = self._acted("input", rows)
        self._changes = torch.where(rows == stock, torch.nan, rows) if self._acting else None
        return rows

    def changes(self, _: Tensor | None = None) -> Tensor | None:
        """Return the elements that the taps changed in this pass, NaN for the others; a second time None."""
        taken, self._changes = self._changes, None
        return taken

    def _acted(self, side: str, rows: Tensor) -> Tensor:
        if side not in self._acting:
            return rows
        after = rows.clone()
        op.site_(after, self._acting[side])
        return after


def correct_entry(block: nn.Module, argument: tuple[int, str], live: LiveTap, entry: Entry, name: str) -> None:
    """Have what enters the first block corrected.

    Args:
        block: it becomes an instance of a subclass of its own class.
        argument: position and name of what enters, among the parameters of the block's forward.
        live: the tap that graphs ask.
        entry: makes what enters.
        name: by which graphs find the tap.
    """
    stock, entered, (position, keyword) = taken_over(block), op.entered, argument

    def corrected(x: Tensor) -> Tensor:
        changed = entered(x.shape, x.dtype, x.device, name)
        return torch.where(changed == changed, changed, x)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if keyword in kwargs:
            return stock(self, *args, **(kwargs | {keyword: corrected(kwargs[keyword])}))
        return stock(self, *args[:position], corrected(args[position]), *args[position + 1 :], **kwargs)

    live.beside = entry.changes
    block.__class__ = subclass(type(block), forward, stock)


def look_up(embedding: nn.Module) -> None:
    """Have a graph read the rows of an embedding as one tensor; not where it is more than one table on this rank."""
    looked_up = op.looked_up

    def forward(self: nn.Module, ids: Tensor) -> Any:
        return looked_up(ids, self.weight)

    if is_table(embedding):
        embedding.__class__ = subclass(type(embedding), forward, taken_over(embedding))


def is_table(embedding: nn.Module, embed: Callable[[Tensor], Tensor] | None = None) -> bool:
    """Whether what embeds tokens, the module if None, gives the rows of the module's table, held by this rank alone."""
    weight = embedding._parameters.get("weight")
    if not isinstance(weight, Tensor) or getattr(embedding, "tp_size", 1) > 1 or not weight.is_contiguous():
        return False
    ids = torch.arange(min(_PROBED, len(weight)), device=weight.device)
    with torch.inference_mode():
        return torch.equal((embed or embedding)(ids), nn.functional.embedding(ids, weight))


def taken_over(module: nn.Module) -> Callable[..., Any]:
    """Return a module's own forward, as a function of module and input, and have that of its class count from now on.

    vLLM binds another one to the instance where it merges projections of modules of transformers.
    """
    bound = module.__dict__.pop("forward", None)
    own: Callable[..., Any] = type(module).forward if bound is None else bound.__func__
    return own


def subclass(cls: type[nn.Module], forward: Callable[..., Any], stock: Callable[..., Any]) -> type[nn.Module]:
    """Return a subclass with another forward, that looks like the stock one."""
    forward.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
