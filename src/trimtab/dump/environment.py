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

from trimtab.dump._calls import in_child, is_model, see_calls
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
    return _begin(config).session


def _begin(config: DumpConfig) -> _Program:
    return _Program(Dump(config, counts_steps=True).start())


class _Program:
    """A program that knows nothing of the dump: finds its models and optimizers, and its end."""

    def __init__(self, session: Dump) -> None:
        self.session = session
        self.process = os.getpid()
        self.error: str | None = None
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._removers: list[Callable[[], Any]] = [
            see_calls(self._on_call),
            optimizers.register_optimizer_step_pre_hook(self._before_update).remove,
            optimizers.register_optimizer_step_post_hook(self._after_update).remove,
        ]
        self._excepthook, sys.excepthook = sys.excepthook, self._on_error
        # Before concurrent.futures, which the writer uses, ends its threads; atexit functions run after that.
        threading._register_atexit(self.end)  # type: ignore[attr-defined]
        in_child[session] = self._forget
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

    def _forget(self) -> Callable[[nn.Module], bool]:
        """In a forked child: take everything off. Its models are recorded if it joins a process group of its own."""
        while self._removers:
            self._removers.pop()()
        inherited = _ranked()

        def take(module: nn.Module) -> bool:
            own = _ranked() and not inherited
            if own:
                _begin(self.session.config)._on_call(module)
            return own

        return take

    def _on_call(self, module: nn.Module) -> None:
        if module in self._known:
            return
        self._known.update(place.module for place in places(module))
        self._known.add(module)
        if is_model(module):
            self.session.watch_found(module)

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.session.before_update()

    def _after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.session.after_update(optimizer)

    def _on_error(self, kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        self.error = f"{kind.__name__}: {value}"
        self._excepthook(kind, value, trace)


def _ranked() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
