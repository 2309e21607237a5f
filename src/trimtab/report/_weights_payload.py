"""The numbers behind the figures of a page about weights, packed to fit one file.

A value goes as base64 of little-endian float32. Directions are added by how far they stand out until `BUDGET` is spent;
the page says how many it leaves out.
"""

from __future__ import annotations

import math
from typing import Any

from trimtab.report._payload import pack
from trimtab.results.weights import WeightsAnalysis, WeightsGrid

BUDGET = 1_050_000  # bytes; with the plotting bundle (1.5 MB) and the tables a page stays under 3 MB
_BYTES = 5.4
_LEFT_OUT = ("cosine_distance",)
"""Measures without a figure: the angle says the same."""
PAIRS = {"susceptibility": ("relative_change", "angle"), "mlp": ("absolute", "angular"), "attention": ("qk", "vo")}
"""What the scatter sets against each other: measures of one part, or the parts of attention."""


def payload(result: WeightsAnalysis) -> dict[str, Any]:
    """Return what the page's script draws from, as plain containers."""
    grids = [grid for grid in result.grids if _drawn(grid)]
    order = _by_size(result, grids)
    room = int(BUDGET / _BYTES / max(1, len(grids) * len(result.layers)))
    kept = sorted(order[: max(1, room)])
    labels = {(one.part, one.measure): one for one in result.measures}
    views = list(dict.fromkeys((grid.part, grid.measure, grid.sign) for grid in grids))
    return {
        "analysis": result.analysis,
        "layers": list(result.layers),
        "directions": [{"name": result.directions[row].name, "kind": result.directions[row].kind} for row in kept],
        "kinds": list(dict.fromkeys(one.kind for one in result.directions)),
        "left_out": len(result.directions) - len(kept),
        "views": [
            {
                "part": part,
                "measure": measure,
                "sign": sign,
                "label": _label(part, labels[part, measure].label, sign),
                "meaning": labels[part, measure].meaning,
                "unit": labels[part, measure].unit,
                "grids": {
                    grid.quantity: pack([value for row in kept for value in grid.values[row]])
                    for grid in grids
                    if (grid.part, grid.measure, grid.sign) == (part, measure, sign)
                },
                "controls": [
                    [one.layer, one.control_mean, one.control_std]
                    for one in result.profiles
                    if (one.part, one.measure, one.sign) == (part, measure, sign) and one.kind in ("all", _only(result))
                ],
                "means": [
                    [one.layer, one.kind, one.mean, one.std, one.mean_abs_z, one.count]
                    for one in result.profiles
                    if (one.part, one.measure, one.sign) == (part, measure, sign)
                ],
            }
            for part, measure, sign in views
        ],
        "focus": [{"part": one.part, "measure": one.measure, "layer": one.layer} for one in result.focus],
        "tests": [
            [one.part, one.measure, one.layer, one.t, one.q, one.effect, one.first, one.second] for one in result.tests
        ],
        "heads": [[one.part, one.layer, one.head, one.mean_abs_z, one.direction, one.z] for one in result.heads],
        "scatter": list(PAIRS[result.analysis]),
    }


def _label(part: str, label: str, sign: int) -> str:
    return f"{part}: {label[0].lower()}{label[1:]}{', opposite' if sign < 0 else ''}"


def _only(result: WeightsAnalysis) -> str:
    """The kind that stands for all where there is one only."""
    kinds = {one.kind for one in result.directions}
    return next(iter(kinds)) if len(kinds) == 1 else "all"


def _drawn(grid: WeightsGrid) -> bool:
    return grid.measure not in _LEFT_OUT


def _by_size(result: WeightsAnalysis, grids: list[WeightsGrid]) -> list[int]:
    """Rows by the largest |z| that a direction has anywhere, principal components first of equals."""
    largest = [0.0] * len(result.directions)
    for grid in grids:
        if grid.quantity == "z":
            for row, values in enumerate(grid.values):
                known = [abs(value) for value in values if not math.isnan(value)]
                largest[row] = max([largest[row], *known])
    return sorted(range(len(largest)), key=lambda row: (-largest[row], row))
