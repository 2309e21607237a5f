"""Comparing on a Ray cluster whose machines see the traces under the same paths.

The plan is made here; each actor opens the traces itself, judges spans of pairs, and only verdicts travel. What comes
out does not depend on the cluster: it is the result of `compare` in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trimtab.compare._parts import Part
from trimtab.compare._sides import open_trace
from trimtab.compare.conclude import conclude
from trimtab.compare.execute import Execution
from trimtab.compare.parallel import AHEAD, judge_span, make_portable, open_plan, share_out
from trimtab.compare.plan import ComparisonPlan, plan_comparison
from trimtab.errors import ComparisonError
from trimtab.results.comparison import Comparison
from trimtab.workflows._ray import cluster, in_order, reason


def compare_on_ray(reference: str, candidate: str, *, address: str, **options: Any) -> Comparison:
    """Compare two traces on a Ray cluster.

    Args:
        reference: path of the trusted run on storage that every machine of the cluster mounts, or an fsspec URL.
        candidate: path of the run under test.
        address: the cluster: "auto", "HOST:PORT", "ray://HOST:PORT", or "local" for one on this machine.
        options: those of `trimtab.compare`, but for `jobs` and `on_compared`.

    Returns:
        What `trimtab.compare` returns.

    Raises:
        PrerequisiteError: ray is not installed.
        InputError: no cluster answers at the address, or an option that cannot be used.
        ComparisonError: a machine of the cluster failed, or cannot read the traces.
    """
    plan = plan_comparison(reference, candidate, **options)
    execution = Execution(plan)
    return conclude(execution, execution.records(judge_on_ray(plan, address)))


def judge_on_ray(plan: ComparisonPlan, address: str) -> Iterator[Part]:
    """Judge the pairs of a plan on a cluster; the parts come in the order of the pairs.

    Raises:
        PrerequisiteError: ray is not installed.
        InputError: no cluster answers at the address.
        ComparisonError: a machine of the cluster failed, or cannot read the traces.
    """
    with cluster(address, "comparing on a cluster") as ray:
        try:
            portable = ray.put(make_portable(plan))
            judge = ray.remote(num_cpus=1)(_Judge)
            spans = share_out(plan, max(1, int(ray.cluster_resources().get("CPU", 1))))
            yield from in_order(ray, lambda: judge.remote(portable), len(spans), spans, AHEAD)
        except ray.exceptions.RayError as error:
            raise ComparisonError(
                f"a machine of the cluster could not compare: {reason(error)}; every one needs this package, and the "
                "traces under the same paths"
            ) from error


class _Judge:
    """An actor: the traces opened once, spans of pairs judged one after the other."""

    def __init__(self, portable: Any) -> None:
        for path in portable.paths:
            open_trace(path)  # a machine that does not see the traces says so before anything is judged
        open_plan(portable)

    def do(self, span: tuple[int, int]) -> Part:
        """Judge the pairs `[begin, end)`."""
        return judge_span(span)
