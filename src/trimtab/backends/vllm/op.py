"""The operators that the model's graph sees, opaque.

`trimtab::site_(x, tap, before)` works in place. torch.compile keeps stock's fusions around it, because it reads and
writes only tensors that stock stores anyway; what it does is looked up by the name of the tap when it runs. Without
rows to change or record it returns at once. On the CPU, where the kernel could be built, `site_` runs in it, and
`live_` is how it asks for Python.

The others are for tensors that stock never stores, but computes, unrounded, where they are read (`fused`). Two return
the elements that a tap changes, NaN for the others: `trimtab::changed(x, tap)` of what a module makes of `x`, and
`trimtab::entered(shape, dtype, device, tap)` of what enters the first block. `trimtab::looked_up(ids, table)` returns
rows of a table.

Compiled for the CPU, a graph calls `site_` only while the requests of some engine of the process have something to do;
and one tap fewer for each block: what would only add its branch to the stream joins the next tap, as `before`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import get_custom_graph_passes
from torch.library import Library
from torch.nn.functional import embedding

from trimtab.backends.vllm.joining import Joining
from trimtab.backends.vllm.kernels import native


class Live(Protocol):
    """A tap of a running engine."""

    @property
    def joins(self) -> bool:
        """Whether the next tap may do what it does."""

    def __call__(self, x: Tensor, before: Tensor | None = None) -> None:
        """Change and record the rows of `x`, in place; `before` is the branch of a tap that joins this one."""

    def enrolled(self, name: str) -> None:
        """Learn the name by which graphs find it."""

    def changes(self, x: Tensor | None) -> Tensor | None:
        """Return the elements that it changes, [rows, width], NaN for the others; `x` is what enters its module."""


_library = Library("trimtab", "FRAGMENT")  # type: ignore[no-untyped-call]
_live: weakref.WeakValueDictionary[str, Live] = weakref.WeakValueDictionary()


def _site(x: Tensor, tap: str, before: Tensor | None = None) -> None:
    found = _live.get(tap)
    if found is not None:
        found(x, before)


def _changed(x: Tensor, tap: str) -> Tensor:
    return _changes(torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device), tap, x)


def _entered(shape: Sequence[int], dtype: torch.dtype, device: torch.device, tap: str) -> Tensor:
    return _changes(torch.full(shape, torch.nan, dtype=dtype, device=device), tap)


def _changes(out: Tensor, tap: str, x: Tensor | None = None) -> Tensor:
    found = _live.get(tap)
    rows = found.changes(x) if found is not None else None
    if rows is not None:
        out.view(-1, out.shape[-1])[: len(rows)] = rows
    return out


_library.define("site_(Tensor(a!) x, str tap, Tensor? before=None) -> ()")  # type: ignore[no-untyped-call]
_library.define("live_(Tensor(a!) x, str tap, Tensor? before=None) -> ()")  # type: ignore[no-untyped-call]
_library.impl("live_", _site, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("site_", _site, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("site_", lambda x, tap, before=None: None, "Meta")  # type: ignore[no-untyped-call]

_library.define("changed(Tensor x, str tap) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("changed", _changed, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("changed", lambda x, tap: x.new_empty(x.shape), "Meta")  # type: ignore[no-untyped-call]
_library.define("entered(SymInt[] shape, ScalarType dtype, Device device, str tap) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("entered", _entered, "BackendSelect")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "trimtab::entered", lambda shape, dtype, device, tap: torch.empty(shape, dtype=dtype, device=device), lib=_library
)
_library.define("looked_up(Tensor ids, Tensor table) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("looked_up", lambda ids, table: embedding(ids, table), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("looked_up", lambda ids, table: table.new_empty((*ids.shape, table.shape[1])), "Meta")  # type: ignore[no-untyped-call]

site_, looked_up = torch.ops.trimtab.site_.default, torch.ops.trimtab.looked_up.default
changed, entered = torch.ops.trimtab.changed.default, torch.ops.trimtab.entered.default
passes: dict[int, None] = {}
"""Tables (`Step`) of which a pass runs that has something to do, or passes like it are to come; by identity."""
CALLED = "while passes, branches joined, fused corrected"
"""How compiled graphs call the operators; a part of what names them in caches."""


def __getattr__(name: str) -> Any:
    """`call`, the name under which compiled graphs import the operator: with as little as can be of Python around it.

    It is looked for when a graph for the CPU is loaded, because it may have to be built.
    """
    if name != "call":
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    kernel = native()
    return getattr(site_, "_op", site_) if kernel is None or kernel.site is None else kernel.site


def _guarded(node: Any, writeline: Callable[[str], None]) -> None:
    """Write the operator's call into what torch.compile makes: in Python code that runs at every step."""
    from torch._inductor.virtualized import V

    given = [*node.codegen_args(), *(one.partition("=")[2] for one in node.codegen_kwargs())]
    arguments = ", ".join(one for one in given if one != "None")
    if node.inputs[0].get_device().type != "cpu":
        writeline(f"torch.ops.trimtab.site_.default({arguments})")
        return
    V.graph.wrapper_code.add_import_once(f"from {__name__} import call as trimtab_site, passes as trimtab_passes")
    writeline(f"if trimtab_passes: trimtab_site({arguments})")


def _joining() -> list[str]:
    return [name for name, live in list(_live.items()) if live.joins]


@functools.cache
def adapt() -> None:
    """Have graphs compiled from now on skip the operator while nothing is to be done, and call it once for two taps.

    Graphs of vLLM's own compiler, on accelerators, have passes of their own there, and call it for every tap.
    """
    config.pre_grad_custom_pass = (
        *get_custom_graph_passes(config.pre_grad_custom_pass),
        Joining(site_, CALLED, _joining),
    )
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    except ImportError:  # another torch: the operator is called, and finds out by itself
        return
    CUSTOM_EXTERN_KERNEL_CODEGEN["torch.ops.trimtab.site_.default"] = CustomCodegen(python=_guarded)


def enroll(name: str, live: Live) -> str:
    """Return the name by which graphs find a tap, for as long as the tap lives.

    The first engine of a process gets the bare name, so that names in compiled graphs are the same from run to run.
    """
    number, unique = 1, name
    while unique in _live:
        number += 1
        unique = f"{name}#{number}"
    _live[unique] = live
    live.enrolled(unique)
    return unique


def name_of(live: Live) -> str:
    """Return the name by which graphs find an enrolled tap."""
    return next(name for name, one in list(_live.items()) if one is live)
