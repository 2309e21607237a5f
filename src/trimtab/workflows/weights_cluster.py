"""Measuring layers on a Ray cluster whose machines see both models under the same paths.

Each actor opens the two models itself and measures one layer at a time, so that no machine holds more than a layer of
each; what it measured travels, and is kept here. What comes out does not depend on the cluster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab import weights
from trimtab._base.optional import require
from trimtab.errors import InputError, UnfinishedError
from trimtab.results.weights import AnalysisName
from trimtab.weights import WeightsRun
from trimtab.weights._rows import LayerPart
from trimtab.weights._run import Settings, Worker
from trimtab.weights.pair import Pair
from trimtab.workflows.cluster import _connect

_ANALYSES: dict[str, Callable[..., WeightsRun]] = {
    "susceptibility": weights.measure_susceptibility,
    "mlp": weights.measure_mlp,
    "attention": weights.measure_attention,
}


def weights_on_ray(
    analysis: AnalysisName, base: str | Path, tuned: str | Path, directions: Any, *, address: str, **options: Any
) -> WeightsRun:
    """Measure what training changed on a Ray cluster, a layer to a worker.

    Args:
        analysis: "susceptibility", "mlp" or "attention".
        base: directory on storage that every machine of the cluster mounts.
        tuned: likewise.
        directions: what `trimtab.weights.read_directions` takes; read here.
        address: the cluster: "auto", "HOST:PORT", "ray://HOST:PORT", or "local" for one on this machine.
        options: those of the analysis, but for `jobs` and `measured`.

    Returns:
        What the analysis returns. Finished layers of a run in `out` are not repeated.

    Raises:
        PrerequisiteError: ray is not installed.
        InputError: no cluster answers at the address, or what the analysis refuses.
        UnfinishedError: a machine of the cluster failed, or cannot read the models; finished layers are kept.
    """
    if analysis not in _ANALYSES:
        raise InputError(f"analysis {analysis!r}; one of {', '.join(_ANALYSES)}")

    def measured(settings: Settings, layers: Sequence[int], opened: Pair) -> Iterator[LayerPart]:
        return measure_on_ray(settings, layers, address)

    return _ANALYSES[analysis](base, tuned, directions, measured=measured, **options)


def measure_on_ray(settings: Settings, layers: Sequence[int], address: str) -> Iterator[LayerPart]:
    """Measure layers on a cluster; they come in order.

    Raises:
        PrerequisiteError: ray is not installed.
        InputError: no cluster answers at the address.
        UnfinishedError: a machine of the cluster failed, or cannot read the models.
    """
    ray = require("ray", extra="ray", feature="measuring on a cluster")
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    actors: list[Any] = []
    try:
        count = min(len(layers), max(1, int(ray.cluster_resources().get("CPU", 1))))
        shared = ray.put(settings)
        worker = ray.remote(num_cpus=1)(Worker)
        actors = [worker.remote(shared) for _ in range(count)]
        waiting: deque[Any] = deque()
        for number, layer in enumerate(layers):
            waiting.append(actors[number % count].measure.remote(layer))
            if len(waiting) > 2 * count:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        said = str(cause).strip().splitlines()
        raise UnfinishedError(
            f"a machine of the cluster could not measure: {said[-1] if said else type(cause).__name__}; each needs "
            "this package, and the models under the same paths; finished layers are kept"
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()
