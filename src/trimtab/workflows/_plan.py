"""What a trace is going to hold, written into its manifest before anything is: a later comparison counts against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.backends import Backend, Capture, Request
from trimtab.sites import Site, resolve_sites
from trimtab.steering import Positions


def trace_plan(
    runner: Backend, requests: Sequence[Request], capture: Capture | None, config: str = ""
) -> dict[str, Any]:
    """Return the plan of a generation trace, as plain JSON.

    Args:
        runner: the model; its sites resolve the patterns.
        requests: what will run, with their ids.
        capture: what will be captured; None records tokens alone.
        config: label of the configuration.

    Raises:
        SiteError: a pattern that selects nothing here.
    """
    plan: dict[str, Any] = {
        "requests": [[one.prompt_index, one.id] for one in requests],
        "dtype": runner.info.dtype,
    }
    if config:
        plan["configs"] = [config]
    if capture is not None:
        plan["sites"] = [str(site) for site in captured_sites(runner, capture.sites)]
        plan["num_layers"] = runner.info.num_layers
        plan["positions"] = Positions.parse(capture.positions).canonical()
    return plan


def captured_sites(runner: Backend, patterns: Sequence[str]) -> tuple[Site, ...]:
    """Return the sites that patterns select in a model.

    Raises:
        SiteError: a pattern that selects nothing here.
    """
    points: dict[int, list[str]] = {}
    for site in runner.sites():
        if site.layer is not None:
            points.setdefault(site.layer, []).append(site.point)
    return resolve_sites(patterns, runner.info.num_layers, lambda layer: points.get(layer, []))
