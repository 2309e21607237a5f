"""Taps of tensors that a graph compiled for the CPU does not store, but computes where they are read (`Tap.fused`).

To store one would part what stock vLLM fuses, and round what it does not round. So the tensor is made again beside the
graph, the tap acts on that, and the graph takes from it the elements that were changed: all others keep stock's bits.

torch.compile stores a tensor that is used twice once more than `realize_reads_threshold` tensors are read for it, and
sums a row up in another order where it is stored. So the graph must store what stock's does: the changes of a norm are
one tensor more, so all norms of a model read some, tapped or not, and the threshold is raised by one (`read_one_more`);
those of what enters the first block are one more too, and the rows of the embedding are one less than ids and table.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config

from trimtab.backends.vllm import op
from trimtab.backends.vllm.live import LiveTap
from trimtab.backends.vllm.step import Step
from trimtab.errors import BackendError

READS = "realize_reads_threshold"
"""Option of Inductor: more tensors than that, and what is used twice is stored."""
_PROBED = 64


def read_one_more(options: dict[str, Any]) -> None:
    """Raise the threshold in Inductor's options, for graphs in which every norm behind a branch is corrected."""
    options[READS] = 1 + options.get(READS, config.realize_reads_threshold)


def correct_norm(norm: nn.Module, name: str, live: LiveTap | None, step: Step) -> None:
    """Have the output of a norm corrected by its tap.

    Args:
        norm: it becomes an instance of a subclass of its own class.
        name: by which graphs find the tap.
        live: the tap; None: there is none, and nothing is ever changed.
        step: the tables of the pass.
    """
    stock, changed = taken_over(norm), op.changed
    native = getattr(type(norm), "forward_native", stock) if stock is type(norm).forward else stock

    def forward(self: nn.Module, x: Tensor) -> Any:
        made = changed(x, name)
        return torch.where(made == made, made, stock(self, x))

    norm.__class__ = subclass(type(norm), forward, stock)
    if live is not None:
        own: Any = weakref.proxy(live)  # what the tap holds must not hold it
        live.beside = partial(_changes, partial(native, norm), name, own, step)


def _changes(norm: Callable[[Tensor], Tensor], name: str, live: LiveTap, step: Step, x: Tensor | None) -> Tensor | None:
    """Return the elements that a tap changes in what a norm makes of the rows of a pass, NaN for the others."""
    if not live.acts:
        return None
    assert x is not None
    before = norm(x.reshape(-1, x.shape[-1])[: step.rows.n])
    after = before.clone()
    op.site_(after, name)
    return torch.where(after == before, torch.nan, after)


class Entry:
    """Makes what enters the first block, before the graph runs.

    Args:
        acting: "output" and "input" -> name of the tap of what is embedded, and of what enters the block.
        positions: gives what is added to the embedded rows in between; None: nothing is.
        step: the tables of the pass.
    """

    def __init__(self, acting: Mapping[str, str], positions: Callable[[], Tensor] | None, step: Step) -> None:
        self._acting = acting
        self._step = step
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
        return taken if self._step.busy else None  # a pass that failed may have left its own

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

    Raises:
        BackendError: the instance has a function for a forward, as with weights that are offloaded.
    """
    bound = module.__dict__.get("forward")
    if bound is None:
        return type(module).forward
    if not isinstance(bound, MethodType) or bound.__self__ is not module:
        raise BackendError(
            f"something else has replaced the forward of a {type(module).__name__} that is to be steered or recorded; "
            "start the engine without offloading weights (cpu_offload_gb, offload backends)"
        )
    del module.__dict__["forward"]
    return bound.__func__


def subclass(cls: type[nn.Module], forward: Callable[..., Any], stock: Callable[..., Any]) -> type[nn.Module]:
    """Return a subclass with another forward, that looks like the stock one."""
    forward.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
