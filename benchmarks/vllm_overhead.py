"""Claims about the vLLM backend on the embedded model: what steering and recording cost beside stock vLLM.

6 blocks, width 128: a decode step takes about two milliseconds, so that overheads show. See _vllm_overhead.py for what
is measured and how. Three more engines run without compilation. 256 steerings over 16 is the quotient of two ratios of
one round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from _claims import Measured, main
from _vllm_engine import Batch
from _vllm_overhead import CONTROL, QUICK_SECONDS, Case, Found, cases, compare, engines, many, measured

SETS = {"compiled": 8, "eager": 2}
"""Sets of processes."""


def compiled(usual: Found, large: Found, deadline: float) -> None:
    base = Batch()
    with engines("testbed") as (stock, other, steered):
        listed = {CONTROL: Case(other, base)} | {name: Case(steered, one) for name, one in cases(base).items()}
        compare(usual, stock, base, listed, 4, deadline)
        many(large, (stock, other, steered), Batch(count=256), 2, deadline)


def eager(found: Found, deadline: float) -> None:
    base = Batch()
    with engines("testbed", eager=True) as (stock, other, steered):
        listed = {"eager_16_steerings": Case(steered, replace(base, steerings=16)), CONTROL: Case(other, base)}
        compare(found, stock, base, listed, 6, deadline)


def measure(quick: bool) -> Iterator[Measured]:
    end = time.perf_counter() + QUICK_SECONDS if quick else float("inf")
    sets = dict.fromkeys(SETS, 1) if quick else SETS
    usual: Found = {}
    large: Found = {}
    for _ in range(sets["compiled"]):
        compiled(usual, large, end)
    yield from measured("testbed", usual)
    few = large.pop("16_steerings")
    yield large["256_steerings"].over(few).measured("vllm_testbed_256_over_16_steerings", large[CONTROL])
    yield from measured("testbed", large)
    if time.perf_counter() < end - 60:
        found: Found = {}
        for _ in range(sets["eager"]):
            eager(found, end)
        yield from measured("testbed", found)


if __name__ == "__main__":
    main(__file__, measure)
