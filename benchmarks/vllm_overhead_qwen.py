"""Claims about the vLLM backend on a model of the shape of Qwen3-0.6B: what steering and recording cost.

28 blocks, width 1024, random weights: a decode step of 16 requests takes some hundred milliseconds on one core. See
_vllm_overhead.py for what is measured and how. Batches are short, those of 256 requests shorter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from _claims import Measured, main
from _vllm_engine import Batch
from _vllm_overhead import QUICK_SECONDS, Found, engines, many, measured, measured_many, usual

SETS = 4
"""Sets of processes."""
LARGE_SECONDS = 240
"""What batches of 256 requests take in one of them; a quick run has no time for it."""


def compiled(few: Found, large: Found, deadline: float) -> None:
    with engines("qwen") as running:
        usual(few, running, Batch(prompt=16, new=8), 4, deadline)
        if time.perf_counter() < deadline - LARGE_SECONDS:
            many(large, running, Batch(count=256, prompt=4, new=4), 2, deadline)


def measure(quick: bool) -> Iterator[Measured]:
    end = time.perf_counter() + QUICK_SECONDS if quick else float("inf")
    few: Found = {}
    large: Found = {}
    for _ in range(1 if quick else SETS):
        compiled(few, large, end)
    yield from measured("qwen", few)
    if large:
        yield from measured_many("qwen", large)


if __name__ == "__main__":
    main(__file__, measure)
