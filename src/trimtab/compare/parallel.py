"""Judging pairs in several processes. Each opens the traces itself; only verdicts travel, and they come in order."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from trimtab.compare._parts import Part
from trimtab.compare._sides import Side, open_trace
from trimtab.compare.execute import Execution
from trimtab.compare.plan import ComparisonPlan
from trimtab.errors import ComparisonError
from trimtab.trace import Trace

_MOST_PAIRS = 128  # of one task
AHEAD = 4  # tasks of each process that may wait: what is judged and not yet taken is bounded


def judge_in_processes(plan: ComparisonPlan, jobs: int) -> Iterator[Part]:
    """Judge the pairs of a plan; the parts come in the order of the pairs.

    The processes are spawned: a program that calls this needs `if __name__ == "__main__":`, as for any spawned process.

    Raises:
        ComparisonError: a process died.
    """
    spans = share_out(plan, jobs)
    if not spans:
        return
    pool = ProcessPoolExecutor(
        min(jobs, len(spans)),
        multiprocessing.get_context("spawn"),
        initializer=open_plan,
        initargs=(make_portable(plan),),
    )
    waiting: deque[Future[Part]] = deque()
    try:
        for span in spans:
            waiting.append(pool.submit(judge_span, span))
            if len(waiting) > AHEAD * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ComparisonError(f"a process that compared died ({error}); repeat with jobs=1 to see why") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def share_out(plan: ComparisonPlan, workers: int) -> list[tuple[int, int]]:
    """Cut what is to be judged of a plan into spans `[begin, end)`, several for each worker."""
    total = len(plan.to_judge)
    size = min(_MOST_PAIRS, max(1, -(-total // (4 * workers))))
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]


@dataclasses.dataclass(frozen=True, slots=True)
class Portable:
    """A plan with paths in place of the opened traces."""

    plan: Any
    paths: tuple[str, ...]


_execution: list[Execution] = []  # of this process, when it is one of several


def make_portable(plan: ComparisonPlan) -> Portable:
    """Return a plan that can be sent to another process."""
    sides = [plan.reference, plan.candidate]
    noise = plan.noise
    if noise is not None:
        sides += [noise.reference, noise.candidate]
    bare = [dataclasses.replace(one, trace=None, units=None, tokens={}, layouts=(), layout_keys=()) for one in sides]  # type: ignore[arg-type]
    if noise is not None:
        noise = dataclasses.replace(noise, reference=bare[2], candidate=bare[3])
    emptied = dataclasses.replace(plan, reference=bare[0], candidate=bare[1], noise=noise, met=(None, None))
    return Portable(emptied, tuple(side.path for side in sides))


def open_plan(portable: Portable) -> None:
    """Open the traces of a plan that was sent here, once per process."""
    plan: ComparisonPlan = portable.plan
    opened: dict[str, Trace] = {}

    def side(bare: Side, path: str) -> Side:
        opened[path] = opened.get(path) or open_trace(path)
        return dataclasses.replace(bare, trace=opened[path])

    noise = plan.noise
    if noise is not None:
        sides = (side(noise.reference, portable.paths[2]), side(noise.candidate, portable.paths[3]))
        noise = dataclasses.replace(noise, reference=sides[0], candidate=sides[1])
    plan = dataclasses.replace(
        plan,
        reference=side(plan.reference, portable.paths[0]),
        candidate=side(plan.candidate, portable.paths[1]),
        noise=noise,
    )
    _execution.append(Execution(plan))


def judge_span(span: tuple[int, int]) -> Part:
    """Judge the pairs `[begin, end)` of what is to be judged of the plan that was opened here."""
    return _execution[0].part(*span)
