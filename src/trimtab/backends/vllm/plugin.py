"""The entry point that vLLM loads in each of its processes (`vllm.general_plugins`).

It leaves two gates behind: where a worker is made, and where an engine core is made. A gate looks whether the engine
was asked to steer (`trimtab.backends.vllm.config.asked`); an engine that was not is stock in every respect.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trimtab._base.log import get_logger
from trimtab.backends.vllm.config import asked, tested, untested
from trimtab.backends.vllm.refused import telling
from trimtab.errors import PrerequisiteError

RPC = "trimtab"
"""Name of the worker method that the client calls."""
_log = get_logger(__name__)
_CORE_MADE = "_initialize_effective_attention_block_size"
"""The method that an engine core calls last of those that we need to be done."""


def register() -> None:
    """Put up the two gates; a second call changes nothing.

    vLLM loads plugins while a worker or a core is being made, so a gate is a method that is called later in that. In a
    release that lacks one, engines that were not asked to steer start as ever, and the others are refused.
    """
    try:
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase
    except ImportError as error:
        _log.warning("this vLLM cannot steer, its parts are elsewhere (%s): %s", error, tested())
        return
    gates = ((WorkerWrapperBase, "init_worker"), (EngineCore, _CORE_MADE))
    lacking = [f"{cls.__name__}.{name}" for cls, name in gates if not hasattr(cls, name)]
    if lacking:
        _wrap(WorkerBase, "__init__", after=functools.partial(_refuse_where_asked, lacking))
        return
    _give_llvmlite_a_dictionary()
    _wrap(WorkerWrapperBase, "init_worker", before=lambda _: _give_llvmlite_a_dictionary())
    _wrap(WorkerBase, "__init__", after=_steer_worker)
    _wrap(EngineCore, _CORE_MADE, after=_steer_core)


@telling()
def _refuse_where_asked(lacking: Sequence[str], worker: Any) -> None:
    if asked(worker.vllm_config) is not None:
        check_version()
        raise PrerequisiteError(f"this vLLM has no {', '.join(lacking)}; {tested()}")


def log_as_vllm_does() -> None:
    """Have our messages appear where vLLM's do, unless the program has said where messages go."""
    ours, theirs = logging.getLogger("trimtab"), logging.getLogger("vllm")
    told = [one for one in (*logging.getLogger().handlers, *ours.handlers) if not isinstance(one, logging.NullHandler)]
    for handler in theirs.handlers if not told else ():
        ours.addHandler(handler)
        ours.setLevel(theirs.getEffectiveLevel())


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

    problem = untested(found)
    if problem is not None:
        raise PrerequisiteError(problem)


def _nothing(_: Any) -> None:
    """Do nothing."""


def _wrap(
    cls: Any, name: str, *, before: Callable[[Any], None] = _nothing, after: Callable[[Any], None] = _nothing
) -> None:
    """Have functions called with the instance before and after a method of a class."""
    stock = getattr(cls, name)
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


@telling()
def _steer_worker(worker: Any) -> None:
    config = asked(worker.vllm_config)
    if config is None:
        return
    log_as_vllm_does()
    check_version()
    additional = worker.vllm_config.additional_config
    if isinstance(additional, dict):  # it is the caller's own, and the worker will write into it
        worker.vllm_config.additional_config = dict(additional)
    load = worker.load_model

    @telling()
    def load_model(*args: Any, **kwargs: Any) -> Any:
        from trimtab.backends.vllm.worker import SteeredWorker, prepare

        prepare(worker.vllm_config, config)
        loaded = load(*args, **kwargs)
        worker.trimtab = SteeredWorker(worker, config).rpc
        return loaded

    worker.load_model = load_model


@telling()
def _steer_core(core: Any) -> None:
    config = asked(core.vllm_config)
    if config is not None:
        log_as_vllm_does()
        from trimtab.backends.vllm import core as ours

        ours.install(core, config)
