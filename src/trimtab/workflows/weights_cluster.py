"""Measuring layers on a Ray cluster whose machines see both models under the same paths.

Each actor opens the two models itself and measures one layer at a time, so that no machine holds more than a layer of
each; what it measured travels, and is kept here. What comes out does not depend on the cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab import weights
from trimtab.errors import InputError, UnfinishedError
from trimtab.results.weights import AnalysisName
from trimtab.weights import WeightsRun
from trimtab.weights._rows import LayerPart
from trimtab.weights._run import Settings, Worker
from trimtab.weights.pair import Pair
from trimtab.workflows._ray import cluster, in_order, reason

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
    with cluster(address, "measuring on a cluster") as ray:
        try:
            shared = ray.put(settings)
            worker = ray.remote(num_cpus=1)(_LayerWorker)
            yield from in_order(ray, lambda: worker.remote(shared), len(layers), layers, 2)
        except ray.exceptions.RayError as error:
            raise UnfinishedError(
                f"a machine of the cluster could not measure: {reason(error)}; each needs this package, and the "
                "models under the same paths; finished layers are kept"
            ) from error


class _LayerWorker:
    """An actor: both models opened once, layers measured one after the other."""

    def __init__(self, settings: Settings) -> None:
        self._worker = Worker(settings)

    def do(self, layer: int) -> LayerPart:
        """Measure a layer."""
        return self._worker.measure(layer)
