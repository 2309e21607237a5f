"""A cluster on this machine finds what one process finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.compare import compare
from trimtab.errors import ComparisonError, InputError
from trimtab.results import to_json
from trimtab.trace import TraceWriter
from trimtab.workflows.cluster import compare_on_ray, judge_on_ray

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two processors on this machine."""
    ray = pytest.importorskip("ray")
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield context
    ray.shutdown()


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    """Forty tensors on each side: identical, close and wrong ones."""
    for side in ("one", "two"):
        generator = torch.Generator().manual_seed(0)
        with TraceWriter(tmp_path / side, provenance={}) as writer:
            for number in range(40):
                tensor = torch.randn(8, 32, generator=generator)
                factor = {0: 1.0, 1: 1 + 2**-22, 2: 1.3}[number % 3] if side == "two" else 1.0
                writer.write(f"t{number}", tensor * factor, step=number % 4)
    return str(tmp_path / "one"), str(tmp_path / "two")


def test_a_cluster_finds_what_one_process_finds(cluster: Any, runs: tuple[str, str]) -> None:
    rules = ["t1: max_abs < 1", "t4: ulp < 1"]
    found = compare_on_ray(*runs, address="auto", rules=rules, keep_rows=True)
    assert to_json(found) == to_json(compare(*runs, rules=rules, keep_rows=True))
    assert not found.passed and len(found.records) == 40


def test_an_empty_plan_starts_no_actor(cluster: Any, tmp_path: Path) -> None:
    for side, name in (("one", "a"), ("two", "b")):
        with TraceWriter(tmp_path / side, provenance={}) as writer:
            writer.write(name, torch.zeros(2))
    assert not compare_on_ray(str(tmp_path / "one"), str(tmp_path / "two"), address="auto").passed


def test_a_machine_without_the_traces_is_one_line(cluster: Any, runs: tuple[str, str], tmp_path: Path) -> None:
    from trimtab.compare.plan import plan_comparison

    plan = plan_comparison(*runs)
    Path(runs[1]).rename(tmp_path / "elsewhere")
    with pytest.raises(ComparisonError, match=r"two.*; every one needs this package, and the traces") as caught:
        list(judge_on_ray(plan, "auto"))
    assert "\n" not in str(caught.value)


def test_no_cluster_is_one_line(runs: tuple[str, str]) -> None:
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(InputError, match=r"no Ray cluster answers at '127.0.0.1:1'") as caught:
        compare_on_ray(*runs, address="127.0.0.1:1")
    assert "\n" not in str(caught.value)
