"""An engine that dies ends the calls that wait for it: vLLM 0.32's clients would let some of them wait for ever."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import weakref
from multiprocessing import connection
from typing import Any

from trimtab.errors import BackendError


def end_waits_when_dead(engine: Any) -> None:
    """Watch the processes of an engine from a thread; nothing is watched where the engine runs in this process.

    Args:
        engine: an `LLMEngine`, or what has the `engine_core` of an `AsyncLLM`.
    """
    core: Any = getattr(engine, "engine_core", None)
    manager: Any = getattr(getattr(core, "resources", None), "engine_manager", None)
    waiting = getattr(core, "outputs_queue", None)
    if not isinstance(waiting, queue.Queue | asyncio.Queue) or not hasattr(manager, "sentinels"):
        return
    sentinels = [os.dup(one) for one in manager.sentinels()]
    arguments = (sentinels, weakref.ref(core))
    threading.Thread(target=_watch, args=arguments, name="trimtab-engine-liveness", daemon=True).start()


def has_died(engine: Any) -> bool:
    """Whether an engine has lost one of its processes, or was shut down."""
    core: Any = getattr(engine, "engine_core", None)
    executor: Any = getattr(getattr(core, "engine_core", None), "model_executor", None)  # of an engine in this process
    marks = (getattr(core, "resources", None), "engine_dead"), (executor, "is_failed")
    return any(getattr(holder, name, False) is True for holder, name in marks)


def dead() -> BackendError:
    """Return what a call of an engine that has died ends with."""
    return BackendError(
        "the engine has died: one of its processes was killed, ran out of memory or failed, or it was shut down. What "
        "was not collected is lost; start it again (its log says why, unless the process was killed)"
    )


def unanswered(engine: Any, verb: str, error: Exception, remedy: str = "") -> BackendError:
    """Return what a call ends with whose question an engine did not answer."""
    if has_died(engine):
        return dead()
    return BackendError(f"the engine did not answer {verb}: {error}{remedy and f'; {remedy}'}")


def _watch(sentinels: list[int], reference: weakref.ref[Any]) -> None:
    connection.wait(sentinels)
    for one in sentinels:
        os.close(one)
    core = reference()
    if core is None:
        return
    # The mark comes first: calls that begin after it are refused by vLLM's client. One that began before it has put its
    # future here; a synchronous one that waits for outputs is the only one in flight, and takes the one end that is
    # sent. Those of an event loop are ended by the shutdown.
    core.resources.engine_dead = True
    if isinstance(core.outputs_queue, queue.Queue):
        core.outputs_queue.put(dead())
    for future in list(core.utility_results.values()):
        if isinstance(future, asyncio.Future):
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits
                future.get_loop().call_soon_threadsafe(_end, future)
        else:
            _end(future)
    core.shutdown()  # vLLM's own monitor leaves this undone when it finds the mark


def _end(future: Any) -> None:
    if not future.done():
        future.set_exception(dead())
        future.exception()  # looked at: a call that was refused does not wait for it
