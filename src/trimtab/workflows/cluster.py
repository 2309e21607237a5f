"""Comparing on a Ray cluster whose machines see the traces under the same paths.

The plan is made here; each actor opens the traces itself, judges spans of pairs, and only verdicts travel. What comes
out does not depend on the cluster: it is the result of `compare` in one process.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from typing import Any

from trimtab._base.optional import require
from trimtab.compare._parts import Part
from trimtab.compare._sides import open_trace
from trimtab.compare.conclude import conclude
from trimtab.compare.execute import Execution
from trimtab.compare.parallel import AHEAD, judge_span, make_portable, open_plan, share_out
from trimtab.compare.plan import ComparisonPlan, plan_comparison
from trimtab.errors import ComparisonError, InputError
from trimtab.results.comparison import Comparison


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
    ray = require("ray", extra="ray", feature="comparing on a cluster")
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    actors: list[Any] = []
    try:
        workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        spans = share_out(plan, workers)
        portable = ray.put(make_portable(plan))
        judge = ray.remote(num_cpus=1)(_Judge)
        actors = [judge.remote(portable) for _ in range(min(workers, len(spans)))]
        waiting: deque[Any] = deque()
        for number, span in enumerate(spans):
            waiting.append(actors[number % len(actors)].judge.remote(span))
            if len(waiting) > AHEAD * len(actors):
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        said = str(cause).strip().splitlines()
        raise ComparisonError(
            f"a machine of the cluster could not compare: {said[-1] if said else type(cause).__name__}; "
            "every one needs this package, and the traces under the same paths"
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


class _Judge:
    """An actor: the traces opened once, spans of pairs judged one after the other."""

    def __init__(self, portable: Any) -> None:
        for path in portable.paths:
            open_trace(path)  # a machine that does not see the traces says so before anything is judged
        open_plan(portable)

    def judge(self, span: tuple[int, int]) -> Part:
        """Judge the pairs `[begin, end)`."""
        return judge_span(span)


def _connect(ray: Any, address: str) -> None:
    """Connect; a port that nobody listens on is tried here, because ray itself tries it for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()
        raise InputError(
            f"no Ray cluster answers at {address!r} ({said[0] if said else type(error).__name__}); give HOST:PORT of "
            "its head, 'auto' on one of its machines, or 'local'"
        ) from error
