"""Memory that was freed goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def return_memory() -> None:
    """Give freed memory back: glibc keeps pieces of what a step held, and more of them with every step.

    A millisecond; does nothing where the C library has no `malloc_trim`.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
