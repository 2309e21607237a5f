"""Claims about what recording costs: every module of a 4-layer encoder of width 512, forward and backward.

A step is forward and backward of 8 x 128 tokens. A recorded step takes inputs, outputs and gradients of every module
into an open trace and commits them; what the writer's threads do counts. CPU seconds of the process decide, wall time
stands in the notes; only values, which wait for the disk, are decided by wall time.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _claims import Measured, main, overhead
from torch import nn

from trimtab import dump
from trimtab.trace import Trace

PARTS = "inputs outputs gradients loss"
BATCH, LENGTH, WIDTH, LAYERS = 8, 128, 512, 4


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def stepper(model: nn.Module) -> Callable[[], None]:
    """Return one step of the model."""
    x = torch.randn(BATCH, LENGTH, WIDTH)

    def step() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return step


def wall(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Recorded:
    """A step of a model that is watched, until its records are committed."""

    def __init__(self, place: Path, level: Any) -> None:
        self.place = place
        self.session = dump.record(place, level=level, parts=PARTS).start()
        model = encoder()
        self.session.watch(model)
        self.step = stepper(model)
        self.walls: list[float] = []

    def __call__(self) -> None:
        began = time.perf_counter()
        self.step()
        self.session.step()
        self.session.flush()
        self.walls.append(time.perf_counter() - began)

    def close(self) -> tuple[int, int]:
        """Return records and bytes of one step."""
        self.session.close()
        index = Trace.open(self.place).filter(step=0).index
        shutil.rmtree(self.place)
        return index.height, sum(4 * torch.Size(shape).numel() for shape in index["shape"].to_list())


def plain_and_raw(step: Callable[[], None], folder: Path, size: int) -> Callable[[], None]:
    """A plain step, then the same bytes written and synced as one plain file."""
    data = torch.randn(size // 4).view(torch.uint8).numpy()

    def work() -> None:
        step()
        path = folder / "raw"
        with path.open("wb", buffering=0) as stream:
            view, at = memoryview(data), 0
            while at < len(view):
                at += stream.write(view[at : at + (64 << 20)])
            os.fsync(stream.fileno())
        path.unlink()

    return work


def measure(quick: bool) -> Iterator[Measured]:
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine count as CPU seconds
    pairs = 5 if quick else 21
    plain = stepper(encoder())
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRIMTAB_BENCH_DIR")) as name:
        folder = Path(name)
        for level in ("statistics", "digests"):
            recorded = Recorded(folder / level, level)
            found, control = overhead(recorded, plain, pairs=pairs)
            notes = {
                "wall_seconds": statistics.median(recorded.walls),
                "plain_wall_seconds": statistics.median(wall(plain) for _ in range(3)),
            }
            notes["records"], size = recorded.close()
            notes["megabytes"] = size / 1e6
            yield Measured(name=f"dump_{level}", samples=found, control=control, notes=notes)
        recorded = Recorded(folder / "values", "values")
        baseline = plain_and_raw(plain, folder, size)
        found, _ = overhead(recorded, baseline, pairs=min(pairs, 9), clock=wall)
        recorded.close()
        yield Measured(name="dump_values", samples=[1 + one for one in found], notes={"megabytes": size / 1e6})
        watched = encoder()
        session = dump.record(folder / "off", steps="1000000")
        session.watch(watched)  # hooks are set, and no step of this run is recorded
        off = stepper(watched)
        found, control = overhead(off, plain, pairs=pairs)
        yield Measured(name="dump_off", samples=found, control=control)


if __name__ == "__main__":
    main(__file__, measure)
