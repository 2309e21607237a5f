"""Run every test at its full size and write the summary, with commit, date and machine, to benchmarks/RESULTS.md."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRIMTAB_TEST_FULL": "1",
}


def main() -> None:
    """Run pytest, pass its output on, add one row to the results."""
    arguments = sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        if re.search(r"\d+ (passed|failed|error)", line):
            last = line.strip("= \n")
    code = process.wait()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    row = f"| {datetime.date.today()} | {commit} | {where} | {(time.monotonic() - began) / 60:.1f} min | {last} |\n"
    results = ROOT / "benchmarks" / "RESULTS.md"
    text = results.read_text()
    marker = "<!-- test-full rows end -->"
    results.write_text(text.replace(marker, row + marker))
    sys.exit(code)


if __name__ == "__main__":
    main()
