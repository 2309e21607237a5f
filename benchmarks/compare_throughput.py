"""Claims about comparing: the default pass against memory bandwidth, small and identical records, memory, linearity.

    python benchmarks/compare_throughput.py [--quick] [--json]

The default pass is what `compare` does with one pair: the fused pass over its chunks and the calibrated verdict. Its
tensors are mapped from traces in the page cache, like those of the two-stream dot beside it; both run on one thread,
interleaved, and are counted in CPU seconds, so the share of the bandwidth is one of bytes per second of the same core.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _claims import Measured, cpu_seconds, main, summary
from torch import Tensor

from trimtab.compare import compare, plan_comparison
from trimtab.compare.align import Aligned
from trimtab.compare.measure import measure as measure_pair
from trimtab.compare.rounding import expected_error
from trimtab.compare.verdict import Calibrated, judge
from trimtab.trace import TraceWriter

MIB = 1 << 20
WIDTH = 4096
LARGE = 64 * MIB
"""Elements of a large pair."""
PERCENTILES = (0.01, 0.05, 0.5, 0.95, 0.99)


def noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values off by a rounding of their own dtype, so that a pair of them passes but is not equal."""
    step = torch.finfo(tensor.dtype).eps / 4
    out = tensor.float()
    return out.addcmul_(out, torch.randn(out.shape, generator=generator), value=step).to(tensor.dtype)


def write_pair(folder: Path, dtype: torch.dtype, elements: int) -> Aligned:
    """Write one record to each of two traces and return the pair, mapped."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(elements // WIDTH, WIDTH, generator=generator).to(dtype)
    for side, tensor in (("reference", reference), ("candidate", noisy(reference, generator))):
        with TraceWriter(folder / side, provenance={}, level="values") as writer:
            writer.write("large", tensor)
    plan = plan_comparison(folder / "reference", folder / "candidate")
    return Aligned(plan.matched.pairs[0], plan.reference.trace, plan.candidate.trace)


def default_pass(aligned: Aligned) -> None:
    """What `compare` does with a pair that passes."""
    measured = measure_pair(aligned.fused(), aligned.shape, aligned.dtypes)
    expected = expected_error(aligned.dtypes[0], blocks=None, width=aligned.width)
    status = judge(Calibrated(), measured, expected, aligned, rule=None, layer=None).status
    assert status == "passed", status


def pass_with_ulp(aligned: Aligned) -> None:
    """The default pass of a pair whose rule asks for ULP as well."""
    default_pass(aligned)
    assert aligned.max_ulp() is not None


def pass_with_all(aligned: Aligned) -> None:
    """The default pass, ULP and the quantiles of the error."""
    pass_with_ulp(aligned)
    aligned.quantiles()


def sides(aligned: Aligned) -> tuple[Tensor, Tensor]:
    """Both tensors whole."""
    chunk = aligned.between(0, aligned.rows)
    return chunk.reference, chunk.candidate


def several_passes(reference: Tensor, candidate: Tensor, percentiles: bool) -> dict[str, Any]:
    """The common way: cast both sides to float32, then one torch reduction after the other."""
    r, c = reference.float(), candidate.float()
    difference = (c - r).abs()
    found: dict[str, Any] = {
        "rel_diff": float(1 - 2 * (r * c).sum() / (r * r + c * c).sum()),
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.mean()),
    }
    if percentiles:
        at = torch.tensor(PERCENTILES)
        for name, tensor in (("reference", r), ("candidate", c), ("difference", difference)):
            found[name] = torch.quantile(tensor.flatten(), at).tolist()
    return found


def interleaved(works: dict[str, Callable[[], object]], rounds: int, best_of: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each work per round, the best of several turns; the order is reversed every turn.

    A neighbour on the same memory makes a single turn take up to four times as long.
    """
    for work in works.values():
        work()
    took: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        turns: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(best_of):
            for name in list(works) if turn % 2 else list(works)[::-1]:
                turns[name].append(cpu_seconds(works[name]))
        for name, seconds in turns.items():
            took[name].append(min(seconds))
    return took


def shares_of_dot(folder: Path, quick: bool) -> Iterator[Measured]:
    """The default pass, alone and with ULP, as a share of the two-stream dot's bytes per second."""
    rounds = 5 if quick else 9
    floats = write_pair(folder / "float32", torch.float32, LARGE)
    halves = write_pair(folder / "bfloat16", torch.bfloat16, LARGE)
    left, right = (side.view(-1) for side in sides(floats))
    took = interleaved(
        {
            "dot": lambda: torch.dot(left, right),
            "fp32": lambda: default_pass(floats),
            "bf16": lambda: default_pass(halves),
            "fp32_with_ulp": lambda: pass_with_ulp(floats),
            "bf16_with_ulp": lambda: pass_with_ulp(halves),
        },
        rounds,
        best_of=4,
    )
    nbytes = {"dot": 8 * LARGE, "fp32": 8 * LARGE, "bf16": 4 * LARGE}
    notes = {
        f"{name}_gigabytes_per_second": nbytes[name[:4].strip("_")] / statistics.median(samples) / 1e9
        for name, samples in took.items()
    }
    for name in ("fp32", "bf16", "fp32_with_ulp", "bf16_with_ulp"):
        share = nbytes[name[:4]] / nbytes["dot"]
        samples = [share * dot / mine for dot, mine in zip(took["dot"], took[name], strict=True)]
        yield Measured(name=f"pass_{name}_share_of_dot", samples=samples, notes=notes)


def against_torch(folder: Path, quick: bool) -> Iterator[Measured]:
    """The default pass against several torch passes over a float32 cast; `torch.quantile` takes 2^24 elements."""
    pair = write_pair(folder / "torch", torch.bfloat16, (4 if quick else 16) * MIB)
    reference, candidate = sides(pair)
    took = interleaved(
        {
            "ours": lambda: default_pass(pair),
            "ours_with_ulp_and_quantiles": lambda: pass_with_all(pair),
            "torch": lambda: several_passes(reference, candidate, True),
            "torch_without_percentiles": lambda: several_passes(reference, candidate, False),
        },
        3 if quick else 7,
    )
    ratios = {name: [a / b for a, b in zip(took[name], took["ours"], strict=True)] for name in took}
    full = statistics.median(took["torch"]) / statistics.median(took["ours_with_ulp_and_quantiles"])
    notes = {
        "torch_without_percentiles_over_ours": statistics.median(ratios["torch_without_percentiles"]),
        "torch_over_ours_with_ulp_and_quantiles": full,
    }
    yield Measured(name="pass_times_faster_than_torch", samples=ratios["torch"], notes=notes)


def small_pairs(folder: Path, quick: bool) -> Iterator[Measured]:
    """A thousand pairs of 8 KB, opened, compared and judged; CPU seconds."""
    generator = torch.Generator().manual_seed(1)
    for side in ("reference", "candidate", "scaled"):
        generator.manual_seed(1)
        with TraceWriter(folder / "small" / side, provenance={}) as writer:
            for number in range(1000):
                tensor = torch.randn(4, 1024, generator=generator).bfloat16()
                other = noisy(tensor, generator)
                chosen = {"reference": tensor, "candidate": other, "scaled": 1.05 * tensor}[side]
                writer.write(f"t{number % 40}", chosen, step=number // 40, phase="fwd_bwd")
    walls = []

    def work(side: str = "candidate") -> None:
        began = time.perf_counter()
        result = compare(folder / "small" / "reference", folder / "small" / side)
        walls.append(time.perf_counter() - began)
        assert len(result.records) == 1000 and result.passed == (side == "candidate")

    work()
    walls.clear()
    samples = [cpu_seconds(work) for _ in range(5 if quick else 9)]
    notes = {"wall_seconds": summary(walls), "all_failing_cpu_seconds": cpu_seconds(lambda: work("scaled"))}
    yield Measured(name="compare_1000_pairs_of_8kb_seconds", samples=samples, notes=notes)


def identical_records(folder: Path, quick: bool) -> Iterator[Measured]:
    """Records whose digests agree, opened, compared and counted; per CPU second."""
    count = 30_000 if quick else 200_000
    with TraceWriter(folder / "same", provenance={}, level="digests") as writer:
        for number in range(count):
            writer.write(f"t{number % 40}", torch.tensor([number]), step=number // 40, phase="fwd_bwd")
    walls = []

    def work() -> None:
        began = time.perf_counter()
        assert compare(folder / "same", folder / "same").ledger.reference.compared == count
        walls.append(time.perf_counter() - began)

    work()
    walls.clear()
    samples = [count / cpu_seconds(work) for _ in range(5 if quick else 9)]
    notes = {"records_per_second": count / statistics.median(walls), "records": count}
    yield Measured(name="identical_records_per_second", samples=samples, notes=notes)


COMPARE = """
import json, pathlib, sys, threading, time
import torch
from trimtab.compare import compare
from trimtab.trace import Trace
torch.set_num_threads(1)

def anonymous():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def measured(steps):
    chosen = [side.filter(step=range(steps)) for side in sides]
    peaks, done = [anonymous()], threading.Event()

    def watch():
        while not done.wait(0.003):
            peaks.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    result = compare(*chosen)
    took = [time.perf_counter() - began, time.process_time() - cpu]
    done.set()
    watcher.join()
    assert result.passed, result.reason
    return [max(peaks), *took]

sides = [Trace.open(path) for path in sys.argv[1:3]]
compare(*(side.filter(step=0) for side in sides))  # compiles, loads
print(json.dumps([measured(int(steps)) for steps in sys.argv[3:]]))
"""


def write_steps(folder: Path, steps: int, megabytes: int) -> tuple[Path, Path]:
    """Write two traces of `steps` records of so many megabytes, off by their rounding."""
    generator = torch.Generator().manual_seed(2)
    reference = torch.randn(megabytes * MIB // 2 // WIDTH, WIDTH, generator=generator).bfloat16()
    paths = folder / "steps-reference", folder / "steps-candidate"
    for path, tensor in zip(paths, (reference, noisy(reference, generator)), strict=True):
        with TraceWriter(path, provenance={}, level="values") as writer:
            for step in range(steps):
                writer.write("large", tensor, step=step)
    return paths


def memory(folder: Path, quick: bool) -> Iterator[Measured]:
    """Peak anonymous memory of a process that compares, and how time and memory grow with the bytes.

    Two traces of 8 GiB, or of a third of the free disk; the notes say how large they were.
    """
    steps, megabytes = (16, 16) if quick else (128, 64)
    steps = min(steps, shutil.disk_usage(folder).free // (3 * megabytes * MIB) // 4 * 4)
    paths = write_steps(folder, steps, megabytes)

    def run() -> list[tuple[float, float, float]]:
        """Peak anonymous memory, wall and CPU seconds: for a quarter of the steps, then for all of them."""
        command = [sys.executable, "-c", COMPARE, *map(str, paths), str(steps // 4), str(steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        return [(peak / 1e9, wall, cpu) for peak, wall, cpu in json.loads(done.stdout)]

    for path in (file for folder in paths for file in folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:  # brings it into the page cache
                while stream.read(16 * MIB):
                    pass
    rounds = [run() for _ in range(3)]
    notes = {
        "gigabytes_per_side": steps * megabytes * MIB / 1e9,
        "peak_of_a_quarter": statistics.median(small[0] for small, _ in rounds),
        "wall_seconds": statistics.median(large[1] for _, large in rounds),
        "cpu_seconds": statistics.median(large[2] for _, large in rounds),
    }
    yield Measured(name="compare_anonymous_memory", samples=[large[0] for _, large in rounds], notes=notes)
    growth = [large[0] - small[0] for small, large in rounds]
    yield Measured(name="compare_anonymous_memory_growth", samples=growth, notes=notes)
    linear = [large[2] / small[2] / 4 for small, large in rounds]
    yield Measured(name="compare_seconds_over_linear", samples=linear, notes=notes)


def measure(quick: bool) -> Iterator[Measured]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRIMTAB_BENCH_DIR")) as name:
        for part in (shares_of_dot, against_torch, small_pairs, identical_records, memory):
            yield from part(Path(name), quick)


if __name__ == "__main__":
    main(__file__, measure)
