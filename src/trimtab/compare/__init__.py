"""Comparing two traces: plan, execute, and a `Comparison` with verdicts, the first divergence and a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.compare.execute import run
from trimtab.compare.fingerprints import find_fingerprints
from trimtab.compare.plan import ComparisonPlan, plan_comparison
from trimtab.compare.rules import Rule
from trimtab.compare.verdict import SCALES, Calibrated, Fixed, Rules, Verdict
from trimtab.results.comparison import Comparison, summarise
from trimtab.trace import Trace

__all__ = [
    "SCALES",
    "Calibrated",
    "Comparison",
    "ComparisonPlan",
    "Fixed",
    "Rule",
    "Rules",
    "compare",
    "find_fingerprints",
    "plan_comparison",
    "run",
    "summarise",
]


def compare(
    reference: Trace | str | Path,
    candidate: Trace | str | Path,
    *,
    verdict: str | Verdict = "calibrated",
    rules: Sequence[str | Rule] | None = None,
    noise: Trace | str | Path | tuple[Trace | str | Path, Trace | str | Path] | None = None,
    waive: Sequence[str] = (),
    expect: str | Path | None = None,
    verify: bool = False,
    config: str | None = None,
    reference_config: str | None = None,
    keep_rows: bool = False,
) -> Comparison:
    """Compare two traces tensor by tensor.

    Rows of generations match by (prompt, request, site, edit, position), other records by (phase, step, micro_step,
    site or name, call_index, rank, kind). Anything that is expected or found and not compared fails, unless waived.

    Args:
        reference: the run that is trusted; a trace or its path.
        candidate: the run under test.
        verdict: "calibrated", `Fixed(...)`, `Rules(...)`, or a published scale: "sglang", "rel_diff_bands", "msprobe".
        rules: "regex: predicate" for single tensors, first match wins; `verdict` judges the others.
        noise: a repeat of the reference with another batch or one-ulp input noise, or two such runs; their difference
            replaces the rounding model.
        waive: globs on names of what may be missing, skipped or inconclusive, alone or as "kind:name"; "failed:name"
            waives a failure.
        expect: a JSON file that says what must be there, on both sides; see `docs/compare.md`.
        verify: hash all stored bytes again; those that changed are corrupt.
        config: take this configuration of the candidate.
        reference_config: take this configuration of the reference.
        keep_rows: keep the errors of every row in the result (`RecordVerdict.series`).

    Returns:
        The comparison; `passed`, `reason` and `exit_code` say how it ended.

    Raises:
        InputError: a verdict, rule, configuration, waiver or expectation that cannot be used.
        ComparisonError: the runs cannot be compared: other prompts, configurations that do not pair up, noise runs
            without noise.
        TraceError: a path that is no trace.

    Example:
        >>> print(summarise(compare("runs/ref", "runs/cand")))  # doctest: +SKIP
    """
    return run(
        plan_comparison(
            reference,
            candidate,
            verdict=verdict,
            rules=rules,
            noise=noise,
            waive=waive,
            expect=expect,
            verify=verify,
            config=config,
            reference_config=reference_config,
            keep_rows=keep_rows,
        )
    )
