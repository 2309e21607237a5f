"""Prefetch: a thread that keeps a few items ready, and stops when it is told to."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL = 0.1  # seconds between looks at whether it is still wanted, while the queue is full


class Prefetch(Generic[T]):
    """Runs an iterator in a thread, at most `depth` items ahead.

    An exception of the iterator is raised by `get`, after the items that came before it.

    Args:
        items: what is iterated, in the thread alone.
        depth: items that may wait; 0 iterates in the caller's thread.
    """

    def __init__(self, items: Iterator[T], *, depth: int) -> None:
        self._items = items
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(max(depth, 1))
        if depth:
            self._thread = threading.Thread(target=self._run, name="trimtab-prefetch", daemon=True)
            self._thread.start()

    def get(self) -> T:
        """Return the next item.

        Raises:
            StopIteration: there is none.
        """
        if self._thread is None:
            return next(self._items)
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))  # it stays the answer
            raise error
        assert item is not None
        return item

    def close(self) -> None:
        """Stop the thread and wait until it has ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(entry, timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False
