"""What steering and recording cost beside stock vLLM without the plugin's setting: what benchmarks of one model share.

bfloat16, on the CPU with one thread. There are three engines in processes of their own, two stock and one with steering
at every layer. Batches are 16 requests (256 where stated), greedy, without an end token, and each has random prompts
that no engine saw before, so that no prefix cache helps one side. A steering adds a vector and caps a projection at
every layer, at every row.

A sample is the CPU seconds that a batch takes in its engine's process over those of a batch of the first stock engine,
minus 1: both run by turns, a step each, on one core (see _vllm_engine.py), each with its own requests. Right before,
both run a batch of a few tokens that is not counted: the first stock engine is in every pair, and the others find less
of their memory in the caches. Everything a user pays for is in a sample: `client.params` of every request,
`LLM.generate`, `client.collect`; the counts of what every op did are always on. The A/A control is the second stock
engine in the place of the one that steers. Several sets of processes are sampled; their medians stand in the notes,
and so does wall time. Intervals take all rounds as independent and do not widen where sets of processes differ: read
those medians beside them.

Stock requests are `SamplingParams` as users write them, which vLLM copies deeply; those of `client.params` carry
`skip_clone`, like the requests of vLLM's own server.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from _claims import Measured
from _vllm_engine import Batch, Engine, together

QUICK_SECONDS = 180
WARM = 4
"""Tokens of a request that warms an engine up."""
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
class Samples:
    """Ratios minus 1 of one case, a list for every set of processes."""

    cpu: list[list[float]] = field(default_factory=list)
    wall: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """CPU seconds of the baseline."""

    def begin(self) -> None:
        """Begin a set of processes."""
        self.cpu.append([])
        self.wall.append([])

    def add(self, stock: dict[str, float], took: dict[str, float]) -> None:
        """Add a round."""
        self.cpu[-1].append(took["cpu"] / stock["cpu"] - 1)
        self.wall[-1].append(took["wall"] / stock["wall"] - 1)
        self.seconds.append(stock["cpu"])

    def over(self, other: Samples) -> Samples:
        """Return how much more this case takes than another one of the same rounds."""

        def ratios(own: list[list[float]], others: list[list[float]]) -> list[list[float]]:
            rounds = (zip(*both, strict=True) for both in zip(own, others, strict=True))
            return [[(1 + a) / (1 + b) - 1 for a, b in one] for one in rounds]

        return Samples(ratios(self.cpu, other.cpu), ratios(self.wall, other.wall), self.seconds)

    def measured(self, name: str, control: Samples) -> Measured:
        medians = " ".join(f"{statistics.median(one):.4f}" for one in self.cpu)
        wall = statistics.median(itertools.chain(*self.wall))
        notes = {"sets": medians, "wall": wall, "baseline_cpu_seconds": statistics.median(self.seconds)}
        mine, others = list(itertools.chain(*self.cpu)), list(itertools.chain(*control.cpu))
        return Measured(name=name, samples=mine, control=others, notes=notes)


Found = dict[str, Samples]
"""By the name of the case; the control is among them."""


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


def compare(found: Found, stock: Engine, base: Batch, listed: dict[str, Case], rounds: int, deadline: float) -> None:
    """Run every case beside a batch of the first stock engine, `rounds` times, in turning order."""
    for name, (engine, batch) in listed.items():
        found.setdefault(name, Samples()).begin()
        for one in ((stock, base), (engine, batch)):
            together(one)  # warm up
    for number in range(rounds):
        if time.perf_counter() > deadline and number > 2:
            break
        for name in list(listed)[:: -1 if number % 2 else 1]:
            order = slice(None, None, -1 if number % 2 else 1)
            for new in (WARM, base.new):
                pair = [
                    (engine, replace(batch, new=new, number=next(_numbers)))
                    for engine, batch in ((stock, base), listed[name])
                ]
                baseline, took = together(*pair[order])[order]
            found[name].add(baseline, took)


def usual(found: Found, running: tuple[Engine, Engine, Engine], base: Batch, rounds: int, deadline: float) -> None:
    """Compare what batches of 16 may carry."""
    stock, other, steered = running
    listed = {CONTROL: Case(other, base)} | {name: Case(steered, one) for name, one in cases(base).items()}
    compare(found, stock, base, listed, rounds, deadline)


def many(found: Found, running: tuple[Engine, Engine, Engine], base: Batch, rounds: int, deadline: float) -> None:
    """Compare batches with 16 and with 256 distinct steerings."""
    stock, other, steered = running
    listed = {CONTROL: Case(other, base)} | {
        f"{count}_steerings": Case(steered, replace(base, steerings=count)) for count in (16, 256)
    }
    compare(found, stock, base, listed, rounds, deadline)


def measured(model: str, found: Found) -> Iterator[Measured]:
    control = found.pop(CONTROL)
    for name, samples in found.items():
        yield samples.measured(f"vllm_{model}_{name}", control)


def measured_many(model: str, found: Found) -> Iterator[Measured]:
    """Give what `many` found: 256 steerings over stock, and over 16 in the same rounds."""
    few = found.pop("16_steerings")
    yield found["256_steerings"].over(few).measured(f"vllm_{model}_256_over_16_steerings", found[CONTROL])
    yield from measured(model, found)
