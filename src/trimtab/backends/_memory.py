"""Out of memory, said so that it can be mended: what was asked for, what was free, which option to lower."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from trimtab.errors import BackendError

_CPU_REQUEST = re.compile(r"tried to allocate (\d+) bytes")
_GPU_REQUEST = re.compile(r"Tried to allocate ([\d.]+ [KMGT]?i?B)")


@contextmanager
def out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn an allocation that failed inside the block into one line.

    Args:
        what: what was being done, such as "a batch of 8 prompts".
        remedy: which option to lower, with its value, such as "lower batch_size (8)".

    Raises:
        BackendError: an allocation failed; the message has the bytes asked for and the bytes free.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise BackendError(_line(what, str(error), remedy)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise BackendError(_line(what, str(error), remedy)) from error


def _line(what: str, message: str, remedy: str) -> str:
    return f"out of memory in {what}: asked for {_asked(message)}, {_free()} free; {remedy}"


def _asked(message: str) -> str:
    if found := _CPU_REQUEST.search(message):
        return _size(int(found[1]))
    if found := _GPU_REQUEST.search(message):
        return found[1]
    return "more than there is"


def _free() -> str:
    if torch.cuda.is_available():
        return _size(torch.cuda.mem_get_info()[0])
    return _size(psutil.virtual_memory().available)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
