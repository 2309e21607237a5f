"""Values are read and let go: what stays is a few KB of verdict per record."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trimtab.trace import TraceWriter

WIDTH, SMALL = 16384, 200  # 64 KB a record
GROWTH = 40 << 20  # the values of both sides are 170 or 630 MB more

READ = """
import pathlib, sys
import torch
from trimtab.compare import plan_comparison
from trimtab.compare.execute import Execution
torch.set_num_threads(1)
peak, kept = 0, []
for number, record in enumerate(Execution(plan_comparison(sys.argv[1], sys.argv[2])).judged()):
    kept.append(record)
    if number % 50 == 0:  # pages of the mapped files are the kernel's to take back: anonymous memory is ours
        status = pathlib.Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
assert all(record.status == "passed" for record in kept), kept[0]
print(len(kept), peak)
"""


def peak(folder: Path, records: int) -> int:
    """Write two traces of so many records and compare them in a process of its own; return its anonymous memory."""
    values = torch.randn(16, WIDTH // 16, generator=torch.Generator().manual_seed(0))
    for name, factor in (("a", 1.0), ("b", 1 + 2**-23)):
        with TraceWriter(folder / name, provenance={}) as writer:
            for step in range(records):
                writer.write("h", values.roll(step % 16, 0) * factor, step=step)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder / "a"), str(folder / "b")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    count, found = map(int, done.stdout.split())
    assert count == records
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
@pytest.mark.parametrize("records", [1500, pytest.param(5000, marks=pytest.mark.full)])
def test_memory_does_not_grow_with_the_values(tmp_path: Path, records: int) -> None:
    few = peak(tmp_path / "few", SMALL)
    assert peak(tmp_path / "many", records) - few < GROWTH
