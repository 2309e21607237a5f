"""Traces in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.compare import Comparison, compare, summarise
from trimtab.trace import Trace


def assert_traces_match(reference: Trace | str | Path, candidate: Trace | str | Path, **options: Any) -> Comparison:
    """Compare two traces, and fail the test that calls this when they do not match.

    Args:
        reference: the run that is trusted.
        candidate: the run under test.
        options: those of `trimtab.compare`.

    Returns:
        The comparison, for further assertions.

    Raises:
        AssertionError: they do not match; the message is the summary of the comparison.

    Example:
        >>> assert_traces_match("runs/ref", "runs/cand", waive=["loss"])  # doctest: +SKIP
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    found = compare(reference, candidate, **options)
    if not found.passed:
        raise AssertionError("the traces do not match\n" + summarise(found))
    return found
