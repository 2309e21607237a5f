"""Claims about the vLLM backend: what steering and recording cost beside stock vLLM without the plugin's setting.

Two models, bfloat16, on the CPU with one thread: the embedded one (6 blocks, width 128: a decode step of about two
milliseconds, so that overheads show) and one of the shape of Qwen3-0.6B with random weights. For each there are three
engines in processes of their own, two stock and one with steering at every layer, that take turns; the embedded model
has three more without compilation. Batches are 16 requests (256 where stated), greedy, without an end token, and each
has random prompts that no engine saw before, so that no prefix cache helps one side. A steering adds a vector and caps
a projection at every layer, at every row.

The figure is the CPU seconds of the engine's process over those of stock, minus 1. Everything a user pays for is in it:
`client.params` of every request, `LLM.generate`, `client.collect`; the counts of what every op did are always on.

What else runs on a shared machine only ever adds time, up to three quarters of it for a second at a time; so a case is
the fastest of its rounds over the fastest of as many stock batches, each run right before one of its own. And two
processes of the same program differ by several percent for as long as they live; so processes are what is sampled: one
sample per set of three. The A/A control is the second stock engine in the place of the one that steers. (256 steerings
over 16 is a comparison within the steered process, and so is its control.) Wall time stands in the notes.

Stock requests are `SamplingParams` as users write them, which vLLM copies deeply; those of `client.params` carry
`skip_clone`, like the requests of vLLM's own server.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from _claims import Measured, main
from _vllm_engine import Batch, Engine

QUICK_SECONDS = 180
SETS = {"testbed": 9, "eager": 5, "qwen": 5}
"""Sets of processes."""
CONTROL = "control"
LAYER = "layers.3.resid_post"
EVERY_LAYER = "layers.*.resid_post"
_numbers = itertools.count(1)


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


class Case(NamedTuple):
    """What is measured beside a batch of the baseline."""

    engine: Engine
    batch: Batch


@dataclass(slots=True)
class Rounds:
    """Seconds of the rounds of one case in one set of processes, {"cpu", "wall"} each."""

    stock: list[dict[str, float]] = field(default_factory=list)
    took: list[dict[str, float]] = field(default_factory=list)

    def ratio(self, clock: str) -> float:
        return min(one[clock] for one in self.took) / min(one[clock] for one in self.stock) - 1


@dataclass(slots=True)
class Samples:
    """Ratios minus 1 of one case, one of every set of processes."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """CPU seconds of the baseline."""

    def add(self, rounds: Rounds) -> None:
        self.cpu.append(rounds.ratio("cpu"))
        self.wall.append(rounds.ratio("wall"))
        self.seconds.append(min(one["cpu"] for one in rounds.stock))

    def measured(self, name: str, control: Samples) -> Measured:
        notes = {"wall": statistics.median(self.wall), "baseline_cpu_seconds": statistics.median(self.seconds)}
        return Measured(name=name, samples=self.cpu, control=control.cpu, notes=notes)


@contextmanager
def engines(model: str, *, eager: bool = False) -> Iterator[tuple[Engine, Engine, Engine]]:
    """Start two stock engines and one that steers, at the same time; end them."""
    running = [Engine(model, steered=steered, eager=eager) for steered in (False, False, True)]
    try:
        for one in running:
            one.wait()
        yield running[0], running[1], running[2]
    finally:
        for one in running:
            one.close()


def compare(
    baseline: Engine, base: Batch, listed: dict[str, Case], *, rounds: int, deadline: float
) -> dict[str, Rounds]:
    """Run every case right after a batch of the baseline, `rounds` times, in turning order."""
    found = {name: Rounds() for name in listed}

    def run(engine: Engine, batch: Batch) -> dict[str, Any]:
        return engine.run(replace(batch, number=next(_numbers)))

    for engine, batch in (Case(baseline, base), *listed.values()):
        run(engine, batch)  # warm up
    for number in range(rounds):
        if time.perf_counter() > deadline and number > 2:
            break
        for name in list(listed)[:: -1 if number % 2 else 1]:
            found[name].stock.append(run(baseline, base))
            found[name].took.append(run(*listed[name]))
    return found


Groups = list[dict[str, Rounds]]
"""Cases that share a control, which is among them."""


def testbed(rounds: int, deadline: float) -> Groups:
    base, large = Batch(), Batch(count=256)
    few, many = replace(large, steerings=16), replace(large, steerings=256)
    with engines("testbed") as (stock, other, steered):
        usual = {CONTROL: Case(other, base)} | {name: Case(steered, one) for name, one in cases(base).items()}
        distinct = {CONTROL: Case(other, large), "256_steerings": Case(steered, many)}
        same = {CONTROL: Case(steered, few), "256_over_16_steerings": Case(steered, many)}
        return [
            compare(stock, base, usual, rounds=rounds, deadline=deadline),
            compare(stock, large, distinct, rounds=2, deadline=deadline),
            compare(steered, few, same, rounds=2, deadline=deadline),
        ]


def eager(rounds: int, deadline: float) -> Groups:
    base = Batch()
    with engines("testbed", eager=True) as (stock, other, steered):
        listed = {"eager_16_steerings": Case(steered, replace(base, steerings=16)), CONTROL: Case(other, base)}
        return [compare(stock, base, listed, rounds=rounds, deadline=deadline)]


def qwen(rounds: int, deadline: float) -> Groups:
    base = Batch(prompt=16, new=8)
    with engines("qwen") as (stock, other, steered):
        listed = {CONTROL: Case(other, base)} | {name: Case(steered, one) for name, one in cases(base).items()}
        return [compare(stock, base, listed, rounds=rounds, deadline=deadline)]


def sampled(model: str, sets: int, run: Callable[[], Groups]) -> Iterator[Measured]:
    """Measure with several sets of processes."""
    found: list[dict[str, Samples]] = []
    for _ in range(sets):
        groups = run()
        found = found or [{name: Samples() for name in group} for group in groups]
        for group, others in zip(found, groups, strict=True):
            for name, samples in group.items():
                samples.add(others[name])
    for group in found:
        control = group.pop(CONTROL)
        for name, samples in group.items():
            yield samples.measured(f"vllm_{model}_{name}", control)


def measure(quick: bool) -> Iterator[Measured]:
    end = time.perf_counter() + QUICK_SECONDS if quick else float("inf")
    sets = dict.fromkeys(SETS, 1) if quick else SETS
    yield from sampled("testbed", sets["testbed"], lambda: testbed(8, end))
    if time.perf_counter() < end - 60:
        yield from sampled("testbed", sets["eager"], lambda: eager(6, end))
    if time.perf_counter() < end - 120:
        yield from sampled("qwen", sets["qwen"], lambda: qwen(2, end))


if __name__ == "__main__":
    main(__file__, measure)
