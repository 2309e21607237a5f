"""Share the compiled passes between threads, and hand them tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@cache
def kernels() -> Any:
    """Import the compiled passes (about half a second, once)."""
    from trimtab.sae import _kernels

    return _kernels


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's memory as the passes read it: bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def share(function: Callable[..., None], count: int, *args: Any, parts: int = 4, least: int = 16) -> None:
    """Call `function(*args, start, stop)` for ranges that make up `count`, on as many threads as torch uses.

    Args:
        function: a compiled pass; it lets go of the GIL.
        count: rows, latents or columns.
        args: what comes before the range.
        parts: ranges per thread, so that an uneven load evens out.
        least: of a range.
    """
    threads = min(torch.get_num_threads(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 64)
    size = max(least, -(-count // (threads * parts)))
    if threads == 1 or size >= count:
        function(*args, 0, count)
        return
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(function, *args, n, min(n + size, count)) for n in range(0, count, size)]:
            future.result()
