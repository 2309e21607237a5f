"""Courses of a metric over its steps, told from the noise between neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median

from trimtab.workflows.commits.plan import Pattern

MIN_POINTS = 8
NOISE_FACTOR = 8.0
"""A feature must stand this far above the median step between neighbours: white noise of 1,000 points stays below."""
SHARE = 0.1
"""And be at least this share of the metric's median size."""

Points = Sequence[tuple[int, float]]


def find(pattern: Pattern, points: Points) -> tuple[int, float] | None:
    """Return the step and value that show a pattern, or None.

    Args:
        pattern: its name.
        points: (step, value); those that are not finite are left to the rule about them.
    """
    finite = [one for one in points if math.isfinite(one[1])]
    return _FINDERS[pattern](finite) if len(finite) >= MIN_POINTS else None


def _threshold(values: Sequence[float]) -> float:
    steps = [abs(b - a) for a, b in pairwise(values)]
    return max(NOISE_FACTOR * median(steps), SHARE * median(map(abs, values)))


def _smooth(values: Sequence[float]) -> list[float]:
    """Median of three, so that one odd point is no course."""
    inner = [median(values[at - 1 : at + 2]) for at in range(1, len(values) - 1)]
    return [values[0], *inner, values[-1]]


def _hump(points: Points, sign: float = 1.0) -> tuple[int, float] | None:
    """The point that stands highest above both what came before it and what comes after."""
    values = [sign * value for _, value in points]
    smooth = _smooth(values)
    before, after = _running(smooth), _running(smooth[::-1])[::-1]
    heights = [value - max(low, high) for value, low, high in zip(smooth, before, after, strict=True)]
    at = max(range(len(heights)), key=heights.__getitem__)
    return points[at] if heights[at] > _threshold(values) else None


def _running(values: Sequence[float]) -> list[float]:
    lowest, found = math.inf, []
    for value in values:
        lowest = min(lowest, value)
        found.append(lowest)
    return found


def _rising(points: Points) -> tuple[int, float] | None:
    values = [value for _, value in points]
    third = max(1, len(values) // 3)
    return points[-1] if median(values[-third:]) - median(values[:third]) > _threshold(values) else None


def _spike(points: Points) -> tuple[int, float] | None:
    values = [value for _, value in points]
    limit = _threshold(values)
    for at in range(1, len(points)):  # a start that falls steeply is no spike
        around = values[max(0, at - 3) : at] + values[at + 1 : at + 4]
        if values[at] - max(around) > limit:
            return points[at]
    return None


def _flat(points: Points) -> tuple[int, float] | None:
    return points[-1] if len({value for _, value in points}) == 1 else None


_FINDERS: Mapping[Pattern, Callable[[Points], tuple[int, float] | None]] = {
    "rise-then-fall": _hump,
    "fall-then-rise": lambda points: _hump(points, -1.0),
    "rising": _rising,
    "spike": _spike,
    "flat": _flat,
}
