"""Calls of modules, seen from outside; and what a process that was forked while a dump was on does with them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab._base.log import get_logger
from trimtab.dump import _manifest

if TYPE_CHECKING:
    from trimtab.dump.session import Dump

_log = get_logger(__name__)
_REASON = "called in a forked child without a rank of its own, which records nothing; begin the process anew (spawn)"
_Take = Callable[[nn.Module], bool]

in_child: weakref.WeakKeyDictionary[Dump, Callable[[], _Take]] = weakref.WeakKeyDictionary()
"""For a dump: called in a forked child; returns what takes the first model called there, False if it is not recorded.
"""


def see_calls(see: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Call `see` with every module before it is called, however it is compiled; hooks would not see all of them.

    Returns:
        A function that ends it.
    """
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            see(self)
        return original(self, *args, **kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]

    def restore() -> None:
        if nn.Module.__call__ is call:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    return restore


def is_model(module: nn.Module) -> bool:
    """Whether it has parameters; a loss that the loop calls itself is no model."""
    return next(module.parameters(), None) is not None


def _watch_child(session: Dump) -> None:
    """In a child that was just forked: let its first model be recorded, or say in the manifest that it is not."""
    forget = in_child.get(session)
    take = forget() if forget is not None else None
    folder = session.path

    def see(module: nn.Module) -> None:
        if not is_model(module):
            return
        restore()
        if take is None or not take(module):
            _say(folder, type(module).__name__)

    restore = see_calls(see)


def _say(folder: Path, model: str) -> None:
    entry = {"module": "(forked child)", "class": model, "reason": _REASON}
    _log.warning("%s is %s", model, _REASON)
    _manifest.note(folder, entry)


def guard_forks(active: Callable[[], Dump | None]) -> None:
    """From here on, a forked child leaves the dump of its parent alone."""

    def after_fork() -> None:
        session = active()
        if session is not None:
            session.abandon()
            _watch_child(session)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=after_fork)
