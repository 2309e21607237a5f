"""Claims about the vLLM backend: what steering and recording cost beside stock vLLM without the plugin's setting.

Two models, bfloat16, on the CPU with one thread: the embedded one (6 blocks, width 128: a decode step of about two
milliseconds, so that overheads show) and one of the shape of Qwen3-0.6B with random weights. For each there are two
engines in processes of their own, one stock and one with steering at every layer, that take turns; the embedded model
has two more without compilation. Batches are 16 requests (256 where stated) of new random prompts, greedy, without an
end token. A steering adds a vector and caps a projection at every layer, at every row.

The figure is the CPU seconds of the engine's process over those of stock, minus 1. Everything a user pays for is in it:
`client.params` of every request, `LLM.generate`, `client.collect`; the counts of what every op did are always on. A
batch is compared with the mean of the stock batches before and after it, and those two with each other: the A/A
control. Wall time stands in the notes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from _claims import Measured, main
from _vllm_engine import Batch, Engine

QUICK_SECONDS = 180
PAIRS = 3
LAYER = "layers.3.resid_post"
EVERY_LAYER = "layers.*.resid_post"


def cases(base: Batch) -> dict[str, Batch]:
    """Return what a batch of 16 may carry, by the name of its claim."""
    return {
        "idle": base,
        "one_steering": replace(base, steerings=1),
        "16_steerings": replace(base, steerings=16),
        "full_dose": replace(base, steerings=16, dose="full"),
        "capture_last_prompt": replace(base, capture=LAYER, positions="last_prompt"),
        "capture_all_generated": replace(base, capture=EVERY_LAYER, positions="generated"),
    }


@dataclass(slots=True)
class Samples:
    """Ratios minus 1 of one case, in the order they were measured."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """CPU seconds of the baseline."""

    def add(self, before: dict[str, Any], took: dict[str, Any], after: dict[str, Any]) -> None:
        self.cpu.append(2 * took["cpu"] / (before["cpu"] + after["cpu"]) - 1)
        self.wall.append(2 * took["wall"] / (before["wall"] + after["wall"]) - 1)
        self.control.append(before["cpu"] / after["cpu"] - 1)
        self.seconds.append(after["cpu"])

    def extend(self, other: Samples) -> None:
        self.cpu += other.cpu
        self.wall += other.wall
        self.control += other.control
        self.seconds += other.seconds

    def measured(self, name: str) -> Measured:
        notes = {"wall": statistics.median(self.wall), "baseline_cpu_seconds": statistics.median(self.seconds)}
        return Measured(name=name, samples=self.cpu, control=self.control, notes=notes)


@contextmanager
def engines(model: str, *, eager: bool = False) -> Iterator[tuple[Engine, Engine]]:
    """Start a stock engine and one that steers, at the same time; end them."""
    running = [Engine(model, steered=steered, eager=eager) for steered in (False, True)]
    try:
        for one in running:
            one.wait()
        yield running[0], running[1]
    finally:
        for one in running:
            one.close()


def compare(
    baseline: Engine, base: Batch, candidate: Engine, listed: dict[str, Batch], *, rounds: int, deadline: float
) -> dict[str, Samples]:
    """Run every case between two batches of the baseline, `rounds` times, in turning order."""
    found = {name: Samples() for name in listed}
    for engine, batch in ((baseline, base), *((candidate, one) for one in listed.values())):
        engine.run(batch)  # warm up
    for number in range(1, rounds + 1):
        if time.perf_counter() > deadline and number > 3:
            break
        before = baseline.run(replace(base, number=number))
        for name in list(listed)[:: -1 if number % 2 else 1]:
            took = candidate.run(replace(listed[name], number=number))
            after = baseline.run(replace(base, number=number))
            found[name].add(before, took, after)
            before = after
    return found


def testbed(rounds: int, deadline: float) -> dict[str, Samples]:
    base, large = Batch(), Batch(count=256)
    many = {"256_steerings": replace(large, steerings=256)}
    with engines("testbed") as (stock, steered):
        found = compare(stock, base, steered, cases(base), rounds=rounds, deadline=deadline)
        found |= compare(stock, large, steered, many, rounds=rounds // 2, deadline=deadline)
        few, same = replace(large, steerings=16), {"256_over_16_steerings": many["256_steerings"]}
        found |= compare(steered, few, steered, same, rounds=rounds // 2, deadline=deadline)
    return found


def eager(rounds: int, deadline: float) -> dict[str, Samples]:
    base = Batch()
    with engines("testbed", eager=True) as (stock, steered):
        listed = {"eager_16_steerings": replace(base, steerings=16)}
        return compare(stock, base, steered, listed, rounds=rounds, deadline=deadline)


def qwen(rounds: int, deadline: float) -> dict[str, Samples]:
    base = Batch(prompt=16, new=8)
    with engines("qwen") as (stock, steered):
        return compare(stock, base, steered, cases(base), rounds=rounds, deadline=deadline)


def pooled(model: str, pairs: int, run: Callable[[], dict[str, Samples]]) -> Iterator[Measured]:
    """Measure with several pairs of engines."""
    found: dict[str, Samples] = {}
    for _ in range(pairs):
        for name, samples in run().items():
            found.setdefault(name, Samples()).extend(samples)
    for name, samples in found.items():
        yield samples.measured(f"vllm_{model}_{name}")


def measure(quick: bool) -> Iterator[Measured]:
    end = time.perf_counter() + QUICK_SECONDS if quick else float("inf")
    pairs = 1 if quick else PAIRS
    yield from pooled("testbed", pairs, lambda: testbed(8 if quick else 12, end))
    if time.perf_counter() < end - 60:
        yield from pooled("testbed", pairs, lambda: eager(8 if quick else 12, end))
    if time.perf_counter() < end - 120:
        yield from pooled("qwen", pairs, lambda: qwen(4 if quick else 5, end))


if __name__ == "__main__":
    main(__file__, measure)
