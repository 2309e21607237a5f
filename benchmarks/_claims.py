"""What every benchmark shares: bounds from claims.toml, intervals from raw samples, one output format.

A benchmark file defines `measure(quick) -> Iterator[Measured]` and ends in `main(__file__, measure)`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

CLAIMS = Path(__file__).with_name("claims.toml")
MAX_PAIRS = 60


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Raw samples of one claim."""

    name: str
    samples: Sequence[float]
    control: Sequence[float] | None = None
    """A/A samples from the same interleaving, in the same unit; needed by overhead claims."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Figures that stand beside the deciding one, such as wall time."""


def bounds(file: str | None = None) -> dict[str, dict[str, Any]]:
    """Return the claims of one benchmark file (None: of all), by name."""
    listed = tomllib.loads(CLAIMS.read_text())["claim"]
    return {one["name"]: one for one in listed if file is None or one["file"] == file}


def interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the median and its percentile-bootstrap interval."""
    values = np.asarray(samples, dtype=np.float64)
    middle = float(np.median(values))
    if len(values) < 3 or np.ptp(values) == 0:
        return middle, float(values.min()), float(values.max())
    found = stats.bootstrap(
        (values,),
        np.median,
        confidence_level=confidence,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return middle, float(found.low), float(found.high)


def evaluate(claim: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """Decide one claim.

    `at_least` holds when the median reaches the bound; `at_most` when it stays within it; `overhead` (a fraction) when
    the upper end of its interval is under the bound plus the A/A half-width, and is undecided when that half-width
    exceeds the bound. Fewer repetitions than the claim asks for never hold. A claim that `needs` a feature of the
    processor says so where it fails without it; it does not hold there.
    """
    value, low, high = interval(measured.samples)
    enough = len(measured.samples) >= claim["repetitions"]
    state = "yes"
    half_width = None
    if claim["direction"] == "overhead":
        assert measured.control is not None, f"{claim['name']} is an overhead and has no A/A control"
        _, control_low, control_high = interval(measured.control)
        half_width = (control_high - control_low) / 2
        holds = high < claim["bound"] + half_width
        state = "undecided" if half_width > claim["bound"] else ("yes" if holds else "no")
    else:
        holds = value >= claim["bound"] if claim["direction"] == "at_least" else value <= claim["bound"]
        state = "yes" if holds else "no"
    if state == "no" and claim.get("needs") and claim["needs"] not in _cpu():
        state = f"this processor has no {claim['needs']}"
    return {
        "name": claim["name"],
        "value": value,
        "interval": [low, high],
        "unit": claim["unit"],
        "direction": claim["direction"],
        "bound": claim["bound"],
        "holds": state == "yes" and enough,
        "state": state if enough else "too few repetitions",
        "control_half_width": half_width,
        "samples": list(map(float, measured.samples)),
        "notes": measured.notes,
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds, all threads, that this process spends in `work`."""
    began = time.process_time()
    work()
    return time.process_time() - began


def overhead(
    work: Callable[[], object],
    baseline: Callable[[], object],
    *,
    pairs: int,
    clock: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> tuple[list[float], list[float]]:
    """Measure `work / baseline - 1` in interleaved pairs, with an A/A control of the baseline against itself.

    The order within a round is reversed every round, so that a drift of the machine cancels.
    """
    work(), baseline()  # warm up
    found, control = [], []
    for number in range(min(pairs, MAX_PAIRS)):
        order = [("a", baseline), ("w", work), ("b", baseline)]
        if number % 2:
            order.reverse()
        took = {name: clock(one) for name, one in order}
        base = (took["a"] + took["b"]) / 2
        found.append(took["w"] / base - 1)
        control.append(took["a"] / took["b"] - 1)
    return found, control


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(errors="replace") if info.is_file() else ""


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    text = _cpu()
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return {
        "platform": platform.platform(),
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "amx_bf16": "amx_bf16" in text,
        "python": platform.python_version(),
    }


def main(file: str, measure: Callable[[bool], Iterator[Measured]]) -> None:
    """Run one benchmark file: measure, decide, print."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--quick", action="store_true", help="end within 50 seconds; claims may stay undecided")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    known = bounds(Path(file).name)
    results = []
    for measured in measure(options.quick):
        result = evaluate(known.pop(measured.name), measured)
        results.append(result)
        if not options.json:
            low, high = result["interval"]
            print(
                f"{result['name']:44} {result['value']:12.5g} [{low:.5g}, {high:.5g}] {result['unit']}"
                f"  {result['direction']} {result['bound']:g}: {result['state']}",
                flush=True,
            )
            if measured.notes:
                print(f"    {beside(measured.notes)}", flush=True)
    results += [{"name": name, "holds": False, "state": "missing"} for name in known]
    if options.json:
        print(json.dumps({"claims": results, "machine": machine()}, default=_plain))
    elif known:
        print(f"missing: {', '.join(known)}")
    if not options.quick and not all(result["holds"] for result in results):
        sys.exit(1)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.floating, float)) and not math.isfinite(value):
        return str(value)
    return value.item() if isinstance(value, np.generic) else str(value)


def beside(notes: dict[str, Any], under: str = "") -> str:
    """Return notes as one line; of a summary its median."""
    parts = []
    for name, value in notes.items():
        if isinstance(value, dict) and set(value) == {"min", "median", "max"}:
            value = value["median"]
        if isinstance(value, dict):
            parts.append(beside(value, f"{under}{name} "))
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            parts.append(f"{under}{name} {value[0]:.4g} to {value[1]:.4g}")
        else:
            parts.append(f"{under}{name} {value:.4g}" if isinstance(value, float) else f"{under}{name} {value}")
    return ", ".join(part.replace("_", " ") for part in parts)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Return minimum, median and maximum, for notes."""
    return {"min": min(samples), "median": statistics.median(samples), "max": max(samples)}
