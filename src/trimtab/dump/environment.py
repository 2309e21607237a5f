"""Dumping turned on from outside: `TRIMTAB_DUMP=DIR` in the environment, and no line of the program changed.

The first module that the program calls from outside is taken for a model and watched; so is every further one. All
optimizers report their steps, and a step ends with the first forward pass after an update.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as optimizers

from trimtab.dump._names import places
from trimtab.dump.config import DumpConfig
from trimtab.dump.session import Dump, active
from trimtab.errors import TrimtabError


def start() -> Dump | None:
    """Turn dumping on if the environment asks for it; it ends with the process."""
    try:
        config = DumpConfig.from_environment(os.environ)
    except (TrimtabError, OSError) as error:
        sys.stderr.write(f"trimtab: {error}\n")
        raise SystemExit(2) from error
    if config is None or active() is not None:
        return None
    session = Dump(config, counts_steps=True).start()
    _Program(session)
    return session


class _Program:
    """A program that knows nothing of the dump: finds its models and optimizers, and its end."""

    def __init__(self, session: Dump) -> None:
        self.session = session
        self.process = os.getpid()
        self.error: str | None = None
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._removers: list[Callable[[], Any]] = [
            _see_calls(self._on_call),
            optimizers.register_optimizer_step_pre_hook(self._before_update).remove,
            optimizers.register_optimizer_step_post_hook(self._after_update).remove,
        ]
        self._excepthook, sys.excepthook = sys.excepthook, self._on_error
        # Before concurrent.futures, which the writer uses, ends its threads; atexit functions run after that.
        threading._register_atexit(self.end)  # type: ignore[attr-defined]
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        from multiprocessing import util

        util.Finalize(None, self.end, exitpriority=100)  # children of multiprocessing run no atexit functions

    def end(self) -> None:
        """Commit; a second call does nothing."""
        if os.getpid() != self.process or not self._removers:
            return
        while self._removers:
            self._removers.pop()()
        if self._known:  # a launcher or a helper that called no model leaves nothing behind
            self.session.close(interrupted=self.error)

    def _forget(self) -> None:
        """A forked child, such as one that loads data, records nothing."""
        while self._removers:
            self._removers.pop()()
        self.session.abandon()

    def _on_call(self, module: nn.Module) -> None:
        if module in self._known:
            return
        self._known.update(place.module for place in places(module))
        self._known.add(module)
        if next(module.parameters(), None) is not None:  # a loss that the loop calls itself is no model
            self.session.watch_found(module)

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.session.before_update()

    def _after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.session.after_update(optimizer)

    def _on_error(self, kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        self.error = f"{kind.__name__}: {value}"
        self._excepthook(kind, value, trace)


def _see_calls(see: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Call `see` with every module before it is called, however it is compiled; hooks would not see all of them."""
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
