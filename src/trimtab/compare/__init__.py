"""Comparing two traces: plan, execute, and a `Comparison` with verdicts, the first divergence and a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.compare.conclude import Tell, run
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
    noise: Trace | str | Path | Sequence[Trace | str | Path] | None = None,
    waive: Sequence[str] = (),
    expect: str | Path | None = None,
    verify: bool = False,
    config: str | None = None,
    reference_config: str | None = None,
    keep_rows: bool = False,
    dims: Sequence[str] = (),
    reference_dims: Sequence[str] = (),
    worst: int = 3,
    tolerances: bool = False,
    jobs: int = 1,
    on_compared: Tell | None = None,
) -> Comparison:
    """Compare two traces tensor by tensor.

    Rows of generations match by (prompt, request, site, edit, position), other records by (phase, step, micro_step,
    site or name, call_index, kind) and by the rank, or by what is left of the ranks' coordinates once tensors are put
    together by their `dims`. Anything that is expected or found and not compared fails, unless waived.

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
        dims: "regex: dims" for the tensors whose whole name the regex matches, in place of the dims that were recorded;
            see `docs/layouts.md`.
        reference_dims: the same for the reference only; they come before `dims`.
        worst: how many of the worst elements and rows are listed of a pair that does not pass.
        tolerances: measure the tolerance that each pair would need, of pairs that pass as well (one more pass).
        jobs: processes that compare; the result does not depend on their number. They are spawned, so a program that
            asks for several needs `if __name__ == "__main__":`.
        on_compared: called with each pair as soon as it is judged (`results.ComparedLine`), and with the verdict last.

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
            dims=dims,
            reference_dims=reference_dims,
            worst=worst,
            tolerances=tolerances,
        ),
        jobs=jobs,
        on_compared=on_compared,
    )
