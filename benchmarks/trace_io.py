"""Claims about traces: how fast records are written, and how fast an index of a million records is opened.

Records are counted per CPU second of the whole process, all threads: on an idle machine with two cores the wall-clock
rate is higher (it stands in the notes), on a busy one it says more about the neighbours.
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

import numpy as np
import polars as pl
import torch
from _claims import Measured, main

from trimtab.trace import Level, TraceWriter
from trimtab.trace._format import FOLDERS, part_name
from trimtab.trace._parts import encode_records

MIB = 1 << 20
PART_BYTES = 64 * MIB
FIELDS = {"phase": "fwd_bwd", "config": "bf16", "prompt": 0, "request": "r0"}


def write_small(folder: Path, level: Level, count: int) -> tuple[float, float]:
    """Write `count` tensors of 8 KB from 40 sites; return records per second, and per CPU second of the process."""
    tensors = [torch.randn(4096).bfloat16() for _ in range(64)]
    sites = [f"layers.{layer}.resid_post" for layer in range(40)]
    place = fresh(folder)
    began, cpu = time.perf_counter(), time.process_time()
    with TraceWriter(place, level=level, provenance={}) as writer:
        for number in range(count):
            site = sites[number % 40]
            writer.write(site, tensors[number % 64], site=site, step=number // 40, **FIELDS)
    took, spent = time.perf_counter() - began, time.process_time() - cpu
    return count / took, count / spent


def write_large(folder: Path, tensors: list[torch.Tensor], count: int) -> float:
    """Write `count` large tensors as a trace; return bytes per second."""
    place = fresh(folder)
    began = time.perf_counter()
    with TraceWriter(place, provenance={}, part_bytes=PART_BYTES) as writer:
        for number in range(count):
            writer.write("large", tensors[number % len(tensors)], step=number)
    return count * tensors[0].nbytes / (time.perf_counter() - began)


def write_raw(folder: Path, tensors: list[torch.Tensor], count: int) -> float:
    """Write the same bytes as plain files of the same size, each synced and renamed; return bytes per second."""
    place = fresh(folder)
    place.mkdir()
    views = [memoryview(tensor.view(torch.uint8).reshape(-1).numpy()) for tensor in tensors]
    per_file = max(1, PART_BYTES // tensors[0].nbytes)
    began = time.perf_counter()
    for first in range(0, count, per_file):
        temporary = place / f"{first}.tmp"
        with temporary.open("wb", buffering=0) as stream:
            for number in range(first, min(first + per_file, count)):
                stream.write(views[number % len(views)])
            os.fsync(stream.fileno())
        temporary.replace(place / f"{first}.bin")
    return count * tensors[0].nbytes / (time.perf_counter() - began)


def share_of_raw(folder: Path, megabytes: int, total: int, samples: int) -> tuple[list[float], list[float]]:
    """Return the rate of a trace over the raw rate, and the raw rates.

    A sample is the best of three runs over the best of three, interleaved in alternating order: what the disk and the
    neighbours do to single runs is larger than any difference between the two.
    """
    tensors = [torch.randn(megabytes * MIB // 4) for _ in range(128 // megabytes)]
    count = total // megabytes
    ratios, raws = [], []
    write_large(folder, tensors, count), write_raw(folder, tensors, count)
    for _ in range(samples):
        order: list[Callable[[Path, list[torch.Tensor], int], float]] = [write_large, write_raw]
        rates: dict[str, list[float]] = {"write_large": [], "write_raw": []}
        for _ in range(3):
            order.reverse()
            for write in order:
                rates[write.__name__].append(write(folder, tensors, count))
        ratios.append(max(rates["write_large"]) / max(rates["write_raw"]))
        raws.append(max(rates["write_raw"]))
    return ratios, raws


def make_index(place: Path, records: int, per_part: int = 8000) -> None:
    """Make a run of a million records as the writer would have left it, its shards sparse."""
    shutil.rmtree(place, ignore_errors=True)
    with TraceWriter(place, provenance={}) as writer:
        for number in range(per_part):
            site = f"layers.{number % 40}.resid_post"
            writer.write(site, torch.tensor([float(number)]), site=site, step=0, positions=[number], **FIELDS)
    rank = place / "rank-00000"
    template = pl.read_parquet(rank / "records/part-00000.parquet")
    for folder in FOLDERS:
        for name in (rank / folder).iterdir():
            name.unlink()
    rng = np.random.default_rng(0)
    for number in range(records // per_part):
        first = number * per_part
        shard = part_name(0, "tensors", number)
        digests = [row.tobytes().hex() for row in rng.integers(0, 256, (per_part, 16), dtype=np.uint8)]
        frame = template.with_columns(
            pl.col("record_id") + first,
            pl.col("order") + first,
            ((pl.col("order") + first) // 400).alias("step"),
            pl.Series("digest", digests),
            pl.Series("mean", rng.random(per_part)),
            pl.Series("std", rng.random(per_part)),
            pl.Series("absmax", rng.random(per_part)),
            pl.lit(shard).alias("shard"),
            (pl.col("record_id") + first).cast(pl.String).alias("key"),
        )
        with (place / shard).open("wb") as stream:
            stream.truncate(per_part * 8192)
        data = encode_records(frame, shard=shard, shard_bytes=per_part * 8192)
        (place / part_name(0, "records", number)).write_bytes(data)
    parts = {"records": records // per_part, "tokens": 0, "dose": 0}
    (rank / "closed.json").write_text(json.dumps({"parts": parts, "records": records, "interrupted": None}))


READ = """
import json, pathlib, sys, time
from trimtab.trace import Trace
began = time.perf_counter()
trace = Trace.open(sys.argv[1], incomplete_ok=False)
found = trace.filter(site="layers.7.resid_post", step=range(100, 600)).index
took = time.perf_counter() - began
assert found.height == 5000, found.height
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would include the process that started this one
print(json.dumps([took, int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9]))
"""


def read_index(place: Path) -> tuple[float, float]:
    """Open and filter in a process of its own; return seconds and the process's peak memory in GB."""
    done = subprocess.run([sys.executable, "-c", READ, str(place)], check=True, stdout=subprocess.PIPE)
    seconds, memory = json.loads(done.stdout)
    return seconds, memory


def fresh(folder: Path) -> Path:
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    os.sync()  # what earlier runs left to the disk must not be paid for by this one
    return place


def measure(quick: bool) -> Iterator[Measured]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRIMTAB_BENCH_DIR")) as name:
        folder = Path(name)
        count, repetitions = (15_000, 5) if quick else (60_000, 9)
        write_small(folder, "values", 2000)  # compiles the statistics
        levels: list[Level] = ["digests", "statistics", "values"]
        rates = {level: [write_small(folder, level, count) for _ in range(repetitions)] for level in levels}
        notes = {
            f"level={level}": {
                "records_per_second": statistics.median(wall for wall, _ in pairs),
                "records_per_cpu_second": statistics.median(cpu for _, cpu in pairs),
            }
            for level, pairs in rates.items()
        }
        yield Measured(name="write_8kb_with_digests", samples=[cpu for _, cpu in rates["digests"]], notes=notes)
        # level "values": digest, statistics and the tensor itself, which is more than the claim asks for
        yield Measured(name="write_8kb_with_statistics", samples=[cpu for _, cpu in rates["values"]], notes=notes)

        ratios, raws = share_of_raw(folder, 4, 384 if quick else 1024, 5 if quick else 9)
        extra = {"raw_bytes_per_second": statistics.median(raws)}
        if not quick:
            extra["share_for_16_mb_tensors"] = statistics.median(share_of_raw(folder, 16, 1024, 3)[0])
        yield Measured(name="write_4mb_share_of_raw", samples=ratios, notes=extra)

        make_index(folder / "index", 1_000_000)
        samples = [read_index(folder / "index") for _ in range(3 if quick else 7)]
        yield Measured(name="open_and_filter_1m_records_seconds", samples=[seconds for seconds, _ in samples])
        yield Measured(name="open_and_filter_1m_records_memory", samples=[memory for _, memory in samples])


if __name__ == "__main__":
    main(__file__, measure)
