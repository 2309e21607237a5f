"""A Ray cluster: connecting to it, sharing work out so that it comes back in order, and what its errors say."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trimtab._base.optional import require
from trimtab.errors import InputError


@contextmanager
def cluster(address: str, feature: str) -> Iterator[Any]:
    """Give the ray module, connected; a connection that was made here ends with the block.

    Args:
        address: "auto", "HOST:PORT", "ray://HOST:PORT", or "local" for a cluster on this machine.
        feature: what ray is for, in the message when it is missing.

    Raises:
        PrerequisiteError: ray is not installed.
        InputError: no cluster answers at the address.
    """
    ray = require("ray", extra="ray", feature=feature)
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def in_order(ray: Any, start: Callable[[], Any], most: int, items: Sequence[Any], ahead: int) -> Iterator[Any]:
    """Have actors do items, each by its method `do`; results come in the order of the items.

    Args:
        ray: connected.
        start: starts an actor.
        most: actors at the most; as many as the cluster has processors otherwise.
        items: what is to be done.
        ahead: items per actor that are under way before the first result is waited for.
    """
    count = min(most, max(1, int(ray.cluster_resources().get("CPU", 1))))
    actors = [start() for _ in range(count)]
    try:
        waiting: deque[Any] = deque()
        for number, item in enumerate(items):
            waiting.append(actors[number % count].do.remote(item))
            if len(waiting) > ahead * count:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    finally:
        for actor in actors:
            ray.kill(actor)


def cause_of(error: Exception) -> Exception:
    """Return what an actor raised."""
    return getattr(error, "cause", None) or error


def reason(error: Exception) -> str:
    """Return the last line of what an actor said."""
    cause = cause_of(error)
    said = str(cause).strip().splitlines()
    return said[-1] if said else type(cause).__name__


def _connect(ray: Any, address: str) -> None:
    """Connect; a port that nobody listens on is tried here, because ray itself tries it for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()
        raise InputError(
            f"no Ray cluster answers at {address!r} ({said[0] if said else type(error).__name__}); give HOST:PORT of "
            "its head, 'auto' on one of its machines, or 'local'"
        ) from error
