"""The one operator that the model's graph sees: `trimtab::site_(x, tap)`, opaque, in place.

torch.compile keeps stock's fusions around it, because it reads and writes only a tensor that stock stores anyway; what
it does is looked up by the name of the tap when it runs. Without rows to change or record it returns at once. On the
CPU, where the kernel could be built, `site_` runs in it, and `live_` is how it asks for Python.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor
from torch.library import Library


class Live(Protocol):
    """A tap of a running engine."""

    def __call__(self, x: Tensor) -> None:
        """Change and record the rows of `x`, in place."""

    def enrolled(self, name: str) -> None:
        """Learn the name by which graphs find it."""


_library = Library("trimtab", "FRAGMENT")  # type: ignore[no-untyped-call]
_live: weakref.WeakValueDictionary[str, Live] = weakref.WeakValueDictionary()


def _site(x: Tensor, tap: str) -> None:
    found = _live.get(tap)
    if found is not None:
        found(x)


_library.define("site_(Tensor(a!) x, str tap) -> ()")  # type: ignore[no-untyped-call]
_library.define("live_(Tensor(a!) x, str tap) -> ()")  # type: ignore[no-untyped-call]
_library.impl("live_", _site, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("site_", _site, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("site_", lambda x, tap: None, "Meta")  # type: ignore[no-untyped-call]

site_ = torch.ops.trimtab.site_.default


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
