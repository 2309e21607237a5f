"""The entry point that vLLM loads in each of its processes (`vllm.general_plugins`).

It leaves two gates behind: where a worker is made, and where an engine core is made. A gate looks whether the engine
was asked to steer (`trimtab.backends.vllm.config.asked`); an engine that was not is stock in every respect.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from trimtab.backends.vllm.config import TESTED, asked
from trimtab.errors import PrerequisiteError

RPC = "trimtab"
"""Name of the worker method that the client calls."""


def register() -> None:
    """Put up the two gates; a second call changes nothing.

    vLLM loads plugins while a worker or a core is being made, so a gate is a method that is called later in that.
    """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    _give_llvmlite_a_dictionary()
    _wrap(WorkerWrapperBase, "init_worker", before=lambda _: _give_llvmlite_a_dictionary())
    _wrap(WorkerBase, "__init__", after=_steer_worker)
    _wrap(EngineCore, "_initialize_effective_attention_block_size", after=_steer_core)


def _give_llvmlite_a_dictionary() -> None:
    """Let an engine start in a process that has loaded numba.

    vLLM looks for Triton kernels in the dictionary of every object of every module; llvmlite's library, which has none,
    answers with a function of that name, and vLLM stops there.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    library: Any = getattr(ffi, "lib", None)
    if library is not None and not isinstance(getattr(library, "__dict__", {}), dict):
        own = type(library)
        library.__class__ = type(own.__name__, (own,), {"__slots__": (), "__dict__": property(lambda self: {})})


def check_version() -> None:
    """Refuse a vLLM that the tests do not run.

    Raises:
        PrerequisiteError: names both versions.
    """
    from vllm import __version__ as found

    if not any(found.startswith(f"{tested}.") or found == tested for tested in TESTED):
        raise PrerequisiteError(
            f"vLLM {found} is installed and steering is tested with {', '.join(f'{one}.x' for one in TESTED)}; "
            f"pip install 'vllm~={TESTED[-1]}.0', or start the engine without the trimtab setting"
        )


def _nothing(_: Any) -> None:
    """Do nothing."""


def _wrap(
    cls: Any, name: str, *, before: Callable[[Any], None] = _nothing, after: Callable[[Any], None] = _nothing
) -> None:
    """Have functions called with the instance before and after a method of a class."""
    stock = getattr(cls, name, None)
    if stock is None:
        raise PrerequisiteError(f"this vLLM has no {cls.__name__}.{name}; steering is tested with {TESTED[-1]}.x")
    if hasattr(stock, "trimtab_stock"):
        return

    @functools.wraps(stock)
    def gate(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self)
        done = stock(self, *args, **kwargs)
        after(self)
        return done

    gate.trimtab_stock = stock  # type: ignore[attr-defined]
    setattr(cls, name, gate)


def _steer_worker(worker: Any) -> None:
    config = asked(worker.vllm_config)
    if config is None:
        return
    check_version()
    additional = worker.vllm_config.additional_config
    if isinstance(additional, dict):  # it is the caller's own, and the worker will write into it
        worker.vllm_config.additional_config = dict(additional)
    load = worker.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        from trimtab.backends.vllm.worker import SteeredWorker

        loaded = load(*args, **kwargs)
        worker.trimtab = SteeredWorker(worker, config).rpc
        return loaded

    worker.load_model = load_model


def _steer_core(core: Any) -> None:
    config = asked(core.vllm_config)
    if config is not None:
        from trimtab.backends.vllm import core as ours

        ours.install(core, config)
