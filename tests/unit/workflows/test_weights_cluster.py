"""A cluster on this machine measures what one process measures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.weights.weights_pairs import directions, noisy, saved_pair
from trimtab.errors import InputError, UnfinishedError
from trimtab.weights import measure_mlp
from trimtab.workflows.weights_cluster import weights_on_ray

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.xdist_group("ray"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two processors on this machine."""
    ray = pytest.importorskip("ray")
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield context
    ray.shutdown()


def test_a_cluster_measures_what_one_process_measures(cluster: Any, tmp_path: Path) -> None:
    models = saved_pair(tmp_path, noisy)
    there = weights_on_ray("mlp", *models, directions(), address="auto", out=tmp_path / "run", controls=16)
    assert there.frame(controls=True).equals(measure_mlp(*models, directions(), controls=16).frame(controls=True))
    assert len(list((tmp_path / "run" / "layers").glob("*.parquet"))) == 3


def test_a_machine_without_the_models_is_one_line(cluster: Any, tmp_path: Path) -> None:
    from trimtab.weights._open import _settings
    from trimtab.weights.mlp_change import measure_layer
    from trimtab.weights.pair import pair
    from trimtab.workflows.weights_cluster import measure_on_ray

    base, tuned = saved_pair(tmp_path, noisy)
    with pair(base, tuned) as opened:
        settings = _settings("mlp", measure_layer, opened, directions(), 32, 0, {"controls": 8})
    tuned.rename(tmp_path / "elsewhere")
    with pytest.raises(
        UnfinishedError, match=r"each needs this package, and the models under the same paths"
    ) as caught:
        list(measure_on_ray(settings, [0], "auto"))
    assert "\n" not in str(caught.value)


def test_an_unknown_analysis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one of susceptibility, mlp, attention"):
        weights_on_ray("norms", tmp_path, tmp_path, {}, address="auto")  # type: ignore[arg-type]
