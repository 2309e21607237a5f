"""Scalar metrics of a run: JSON lines that it printed or wrote, and TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab._base.optional import require

Metrics = dict[str, list[tuple[int, float]]]
"""(step, value) in the order in which they were written, by the metric's name."""

STEP_NAMES = ("step", "global_step", "iteration", "iter")
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_EVENTS = "events.out.tfevents."
MAX_POINTS = 400


def read_metrics(stdout: Path, out: Path, pattern: str) -> Metrics:
    """Return every scalar of a run.

    Args:
        stdout: what it printed; lines that are JSON objects are read.
        out: its directory; files that match `pattern` are read the same way, TensorBoard events wherever they are.
        pattern: a glob.

    Raises:
        PrerequisiteError: there are TensorBoard events, and no reader for them.
    """
    found: Metrics = {}
    inside = [one for one in sorted(out.glob(pattern)) if one.is_file() and not _in_trace(one, out)]
    for file in (stdout, *(one for one in inside if one != stdout)):
        if file.is_file():
            for name, step, value in _json_lines(file):
                found.setdefault(name, []).append((step, value))
    folders = {one.parent for one in out.rglob(f"{_EVENTS}*") if not _in_trace(one, out)}
    for folder in sorted(folders):
        _read_events(folder, folder.relative_to(out), len(folders) > 1, found)
    return found


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most about `MAX_POINTS` points, the first, last, smallest, largest and first non-finite among them."""
    if len(points) <= MAX_POINTS:
        return points
    finite = [at for at, (_, value) in enumerate(points) if math.isfinite(value)]
    keep = {0, len(points) - 1, *range(0, len(points), -(-len(points) // (MAX_POINTS - 5)))}
    keep |= {min(finite, key=lambda at: points[at][1]), max(finite, key=lambda at: points[at][1])} if finite else set()
    keep |= {next((at for at, (_, value) in enumerate(points) if not math.isfinite(value)), 0)}
    return [points[at] for at in sorted(keep)]


def _in_trace(file: Path, out: Path) -> bool:
    return file.relative_to(out).parts[0] == "trace"


def _json_lines(file: Path) -> Iterator[tuple[str, int, float]]:
    """Yield (metric, step, value); a line without a step counts on from the metric's last one."""
    last: dict[str, int] = {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            text = line.strip()
            if not text.startswith("{"):
                continue
            try:
                document = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(document, dict):
                continue
            named = next((document[name] for name in STEP_NAMES if isinstance(document.get(name), int)), None)
            for name, value in _scalars(document):
                last[name] = last.get(name, -1) + 1 if named is None else int(named)
                yield name, last[name], value


def _scalars(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in document.items():
        if not prefix and key in STEP_NAMES:
            continue
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, str) and value in _NONFINITE:
            yield f"{prefix}{key}", _NONFINITE[value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", _float(value)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _read_events(folder: Path, name: Path, several: bool, found: Metrics) -> None:
    """Add the scalars of one folder of events; with several folders, the folder's name stands before the tag."""
    reader: Any = require(
        "tensorboard.backend.event_processing.event_accumulator",
        extra="tensorboard",
        feature="reading TensorBoard events",
    )
    # A restart that repeats steps is shown as it was written: nothing is purged, nothing is sampled.
    events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}, purge_orphaned_data=False)
    events.Reload()
    prefix = f"{name.as_posix()}/" if several and name.parts else ""
    tags = events.Tags()
    for tag in tags["scalars"]:
        found.setdefault(prefix + tag, []).extend((one.step, one.value) for one in events.Scalars(tag))
    for tag in tags["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            make: Any = require(
                "tensorboard.util.tensor_util", extra="tensorboard", feature="reading TensorBoard events"
            )
            points = ((one.step, float(make.make_ndarray(one.tensor_proto).item())) for one in events.Tensors(tag))
            found.setdefault(prefix + tag, []).extend(points)
