"""An engine process that dies ends the calls that wait for it: vLLM 0.32's synchronous client would wait for ever."""

from __future__ import annotations

import os
import queue
import threading
import time
from multiprocessing import connection
from typing import Any

from trimtab.errors import BackendError

_SETTLE_S = 10.0
"""How long vLLM's own monitor may take to mark the engine as dead, after which its client refuses calls by itself."""


def end_waits_when_dead(engine: Any) -> None:
    """Watch the processes of an engine from a thread; nothing is watched where the engine runs in this process.

    Args:
        engine: an `LLMEngine`.
    """
    core: Any = getattr(engine, "engine_core", None)
    resources: Any = getattr(core, "resources", None)
    manager: Any = getattr(resources, "engine_manager", None)
    outputs: Any = getattr(core, "outputs_queue", None)
    if not isinstance(outputs, queue.Queue) or not hasattr(manager, "sentinels"):
        return
    sentinels = [os.dup(one) for one in manager.sentinels()]
    arguments = (sentinels, resources, outputs, core.utility_results)
    threading.Thread(target=_watch, args=arguments, name="trimtab-engine-liveness", daemon=True).start()


def _watch(sentinels: list[int], resources: Any, outputs: Any, answers: dict[int, Any]) -> None:
    connection.wait(sentinels)
    for one in sentinels:
        os.close(one)
    outputs.put(_dead())
    end = time.monotonic() + _SETTLE_S
    while not resources.engine_dead and time.monotonic() < end:
        time.sleep(0.05)
    # a call that saw the engine alive had put its future here before: none can be missed now
    for future in list(answers.values()):
        if not future.done():
            future.set_exception(_dead())


def _dead() -> BackendError:
    return BackendError("a process of the engine ended without a word: killed, or out of memory")
