"""Claims about the command line: how long `trimtab --help` and `trimtab demo` take, as whole processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _claims import Measured, main


def seconds(*arguments: str) -> float:
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as `make demo` does
    subprocess.run(
        [sys.executable, "-m", "trimtab", *arguments], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    return time.perf_counter() - began


def measure(quick: bool) -> Iterator[Measured]:
    seconds("--help")
    yield Measured(name="help_seconds", samples=[seconds("--help") for _ in range(7)])
    with tempfile.TemporaryDirectory() as folder:
        size = ("--quick",) if quick else ()
        yield Measured(name="demo_seconds", samples=[seconds("demo", "--out", str(Path(folder) / "demo"), *size)])


if __name__ == "__main__":
    main(__file__, measure)
