"""One thread that commits, fed by a queue that is bounded in bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

_WAKE_BYTES = 1 << 20  # wake the thread per megabyte, not per record


class Sink(Protocol):
    """What the thread feeds; it calls `Worker.release` for bytes that it no longer holds."""

    def add(self, item: Any) -> None:
        """Take one item."""

    def commit(self) -> None:
        """Begin to make everything taken durable."""

    def settle(self) -> None:
        """Return when everything taken is durable."""

    def end(self) -> None:
        """Give back what the sink holds."""


class Worker:
    """Runs a sink in a daemon thread.

    Args:
        limit: bytes that may be held between `put` and `release`; `put` blocks above it. One item above the limit
            passes when nothing else is held.
        seconds: age of the oldest item after which the sink commits.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self.error: BaseException | None = None
        self._limit, self._seconds = limit, seconds
        self._condition = threading.Condition()
        self._pending: list[Any] = []
        self._pending_bytes = 0
        self._held = 0
        self._waiting: list[int] = []  # bytes that blocked producers want to add
        self._oldest: float | None = None
        self._flushing = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self, sink: Sink) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, args=(sink,), name="trimtab-trace-writer", daemon=True)
        self._thread.start()

    def put(self, item: Any, cost: int) -> None:
        """Queue an item; blocks while too many bytes are held. Look at `error` afterwards."""
        condition = self._condition
        with condition:
            if self._held and self._held + cost > self._limit:
                self._wait(lambda: not self._held or self._held + cost <= self._limit, cost)
            if self.error is not None:
                return
            if self._oldest is None:
                self._oldest = time.monotonic()
                condition.notify_all()  # the thread sleeps without a deadline until something is held
            self._pending.append(item)
            self._held += cost
            self._pending_bytes += cost
            if self._pending_bytes >= _WAKE_BYTES:
                condition.notify_all()

    def release(self, count: int) -> None:
        """Count bytes as no longer held."""
        with self._condition:
            self._held -= count
            if self._waiting:
                self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        """Keep the first error and let everybody who waits see it; the thread ends."""
        with self._condition:
            self.error = self.error or error
            self._pending, self._pending_bytes, self._held, self._flushing = [], 0, 0, False
            self._condition.notify_all()

    def flush(self) -> None:
        """Return when everything put before is committed, or the thread has failed."""
        with self._condition:
            self._flushing = True
            self._wait(lambda: not self._flushing)

    def close(self) -> None:
        """Commit everything and end the thread."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _wait(self, done: Callable[[], bool], *wanted: int) -> None:
        self._waiting.extend(wanted)
        self._condition.notify_all()
        while self.error is None and not done():
            self._condition.wait()
        for one in wanted:
            self._waiting.remove(one)

    def _run(self, sink: Sink) -> None:
        try:
            while self._step(sink):
                pass
        except BaseException as error:
            self.fail(error)
        finally:
            sink.end()

    def _step(self, sink: Sink) -> bool:
        with self._condition:
            while not self._ready():
                self._condition.wait(self._patience())
            batch, self._pending, self._pending_bytes = self._pending, [], 0
            ending = self._closing
            commit = ending or self._flushing or self._due()
            if commit:
                self._oldest = None
        for item in batch:
            sink.add(item)
        del batch  # the sink decides what stays in memory
        if commit or self._starved():
            sink.commit()
        if commit:
            sink.settle()
        with self._condition:
            if commit and not self._pending:
                self._flushing = False
            elif self._pending and self._oldest is None:
                self._oldest = time.monotonic()
            self._condition.notify_all()
        return not ending and self.error is None

    def _ready(self) -> bool:
        urgent = self.error or self._closing or self._flushing or self._waiting or self._due()
        return bool(urgent or self._pending_bytes >= _WAKE_BYTES)

    def _starved(self) -> bool:
        with self._condition:
            wanted = min(self._waiting, default=None)
            return wanted is not None and not self._pending and self._held + wanted > self._limit

    def _due(self) -> bool:
        return self._oldest is not None and time.monotonic() - self._oldest >= self._seconds

    def _patience(self) -> float | None:
        return None if self._oldest is None else max(0.0, self._oldest + self._seconds - time.monotonic())
