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
from _vllm_overhead import CONTROL, QUICK_SECONDS, Case, Found, compare, engines, many, measured, measured_many, usual

SETS = {"compiled": 8, "eager": 2}
"""Sets of processes."""


def compiled(few: Found, large: Found, deadline: float) -> None:
    with engines("testbed") as running:
        usual(few, running, Batch(), 4, deadline)
        many(large, running, Batch(count=256), 2, deadline)


def eager(found: Found, deadline: float) -> None:
    base = Batch()
    with engines("testbed", eager=True) as (stock, other, steered):
        listed = {"eager_16_steerings": Case(steered, replace(base, steerings=16)), CONTROL: Case(other, base)}
        compare(found, stock, base, listed, 6, deadline)


def measure(quick: bool) -> Iterator[Measured]:
    end = time.perf_counter() + QUICK_SECONDS if quick else float("inf")
    sets = dict.fromkeys(SETS, 1) if quick else SETS
    few: Found = {}
    large: Found = {}
    for _ in range(sets["compiled"]):
        compiled(few, large, end)
    yield from measured("testbed", few)
    yield from measured_many("testbed", large)
    if time.perf_counter() < end - 60:
        found: Found = {}
        for _ in range(sets["eager"]):
            eager(found, end)
        yield from measured("testbed", found)


if __name__ == "__main__":
    main(__file__, measure)
