"""The one operator that the model's graph sees: `trimtab::site_(x, tap, before)`, opaque, in place.

torch.compile keeps stock's fusions around it, because it reads and writes only tensors that stock stores anyway; what
it does is looked up by the name of the tap when it runs. Without rows to change or record it returns at once. On the
CPU, where the kernel could be built, `site_` runs in it, and `live_` is how it asks for Python.

Compiled for the CPU, a graph calls it only while the requests of some engine of the process have something to do; and
one tap fewer for each block: what would only add its branch to the stream joins the next tap, as `before`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import get_custom_graph_passes
from torch.library import Library

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


_library = Library("trimtab", "FRAGMENT")  # type: ignore[no-untyped-call]
_live: weakref.WeakValueDictionary[str, Live] = weakref.WeakValueDictionary()


def _site(x: Tensor, tap: str, before: Tensor | None = None) -> None:
    found = _live.get(tap)
    if found is not None:
        found(x, before)


_library.define("site_(Tensor(a!) x, str tap, Tensor? before=None) -> ()")  # type: ignore[no-untyped-call]
_library.define("live_(Tensor(a!) x, str tap, Tensor? before=None) -> ()")  # type: ignore[no-untyped-call]
_library.impl("live_", _site, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("site_", _site, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("site_", lambda x, tap, before=None: None, "Meta")  # type: ignore[no-untyped-call]

site_ = torch.ops.trimtab.site_.default
passes: dict[int, None] = {}
"""Tables (`Step`) of which a pass runs that has something to do, or passes like it are to come; by identity."""
CALLED = "while passes, branches joined"
"""How compiled graphs call the operator; a part of what names them in caches."""


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
