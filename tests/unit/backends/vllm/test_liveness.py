"""A client of an engine whose process died: every call ends, whenever it began."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.backends.vllm.liveness import end_waits_when_dead, has_died
from trimtab.errors import BackendError


class Client:
    """What vLLM's synchronous client does when it is asked: look at the mark, then wait for ever."""

    def __init__(self) -> None:
        alive, self.life = os.pipe()
        self.resources = SimpleNamespace(engine_dead=False, engine_manager=SimpleNamespace(sentinels=lambda: [alive]))
        self.outputs_queue: queue.Queue[Any] = queue.Queue()
        self.utility_results: dict[int, Future[Any]] = {}
        self.closed = threading.Event()

    def call(self) -> None:
        if self.resources.engine_dead:
            raise BackendError("marked")
        raise self.outputs_queue.get(timeout=20)

    def utility(self) -> None:
        future: Future[Any] = Future()
        self.utility_results[0] = future
        if self.resources.engine_dead:
            raise BackendError("marked")
        future.result(timeout=20)

    def shutdown(self) -> None:
        self.closed.set()


def test_calls_before_and_after_the_death_of_an_engine_all_end() -> None:
    for _ in range(50):
        client = Client()
        end_waits_when_dead(SimpleNamespace(engine_core=client))
        os.close(client.life)
        for call in (client.call, client.call, client.utility):
            with pytest.raises(BackendError, match=r"the engine has died|marked"):
                call()
        assert client.closed.wait(20)
        assert client.resources.engine_dead


def test_a_question_under_way_ends_with_the_engine() -> None:
    client = Client()
    client.utility_results[0] = waiting = Future()
    end_waits_when_dead(SimpleNamespace(engine_core=client))
    os.close(client.life)
    assert isinstance(waiting.exception(20), BackendError)


def test_a_question_of_an_event_loop_ends_with_the_engine() -> None:
    async def ask() -> BaseException | None:
        client = Client()
        client.outputs_queue = asyncio.Queue()  # type: ignore[assignment]
        client.utility_results[0] = waiting = asyncio.get_running_loop().create_future()  # type: ignore[assignment]
        end_waits_when_dead(SimpleNamespace(engine_core=client))
        os.close(client.life)
        await asyncio.wait([waiting], timeout=20)
        assert await asyncio.to_thread(client.closed.wait, 20)
        return waiting.exception()

    assert isinstance(asyncio.run(ask()), BackendError)


def test_an_engine_has_died_when_its_core_or_a_worker_has() -> None:
    for marked in (False, True):
        apart = SimpleNamespace(resources=SimpleNamespace(engine_dead=marked))
        inside = SimpleNamespace(engine_core=SimpleNamespace(model_executor=SimpleNamespace(is_failed=marked)))
        assert [has_died(SimpleNamespace(engine_core=one)) for one in (apart, inside)] == [marked, marked]
    assert not has_died(SimpleNamespace())


def test_an_engine_in_this_process_is_not_watched() -> None:
    before = threading.active_count()
    end_waits_when_dead(SimpleNamespace(engine_core=SimpleNamespace()))
    assert threading.active_count() == before
