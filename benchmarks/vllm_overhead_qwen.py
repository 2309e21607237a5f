"""Claims about the vLLM backend on a model of the shape of Qwen3-0.6B: what steering and recording cost.

28 blocks, width 1024, random weights: a decode step of 16 requests takes some hundred milliseconds on one core. See
_vllm_overhead.py for what is measured and how. Batches are short, those of 256 requests shorter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from _claims import Measured, main
from _vllm_engine import Batch
from _vllm_overhead import CONTROL, QUICK_SECONDS, Case, Found, cases, compare, engines, many, measured

SETS = 4
"""Sets of processes."""


def compiled(usual: Found, large: Found, deadline: float) -> None:
    base = Batch(prompt=16, new=8)
    with engines("qwen") as (stock, other, steered):
        listed = {CONTROL: Case(other, base)} | {name: Case(steered, one) for name, one in cases(base).items()}
        compare(usual, stock, base, listed, 4, deadline)
        many(large, (stock, other, steered), Batch(count=256, prompt=4, new=4), 2, deadline)


def measure(quick: bool) -> Iterator[Measured]:
    end = time.perf_counter() + QUICK_SECONDS if quick else float("inf")
    usual: Found = {}
    large: Found = {}
    for _ in range(1 if quick else SETS):
        compiled(usual, large, end)
    yield from measured("qwen", usual)
    few = large.pop("16_steerings")
    yield large["256_steerings"].over(few).measured("vllm_qwen_256_over_16_steerings", large[CONTROL])
    yield from measured("qwen", large)


if __name__ == "__main__":
    main(__file__, measure)
