"""An engine process that dies ends the calls that wait for it: vLLM 0.32's synchronous client would wait for ever."""

from __future__ import annotations

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
        engine: an `LLMEngine`.
    """
    core: Any = getattr(engine, "engine_core", None)
    manager: Any = getattr(getattr(core, "resources", None), "engine_manager", None)
    if not isinstance(getattr(core, "outputs_queue", None), queue.Queue) or not hasattr(manager, "sentinels"):
        return
    sentinels = [os.dup(one) for one in manager.sentinels()]
    arguments = (sentinels, weakref.ref(core))
    threading.Thread(target=_watch, args=arguments, name="trimtab-engine-liveness", daemon=True).start()


def _watch(sentinels: list[int], reference: weakref.ref[Any]) -> None:
    connection.wait(sentinels)
    for one in sentinels:
        os.close(one)
    core = reference()
    if core is None:
        return
    # The mark comes first: calls that begin after it are refused by vLLM's client. One that began before it is the
    # only one in flight, has put its future here, and takes the one end that is sent.
    core.resources.engine_dead = True
    core.outputs_queue.put(_dead())
    for future in list(core.utility_results.values()):
        if not future.done():
            future.set_exception(_dead())
    core.shutdown()  # vLLM's own monitor leaves this undone when it finds the mark


def _dead() -> BackendError:
    return BackendError("a process of the engine ended without a word: killed, or out of memory")
