"""The first trustworthy divergence of two runs: the module that made the error, its source, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.compare import ComparisonPlan, plan_comparison, run
from trimtab.errors import InputError, TrimtabError
from trimtab.results.comparison import Comparison, Fingerprint
from trimtab.results.triage import Fix, Hunk, SourceReference, Transplanted, Triage
from trimtab.trace import Trace
from trimtab.workflows.triage import _explain
from trimtab.workflows.triage._calls import Call, build_calls
from trimtab.workflows.triage._context import find_in_context
from trimtab.workflows.triage._inputs import check_lengths, micro_batches
from trimtab.workflows.triage._locate import Found, ingredients, locate
from trimtab.workflows.triage._manifests import compare_manifests, groups_known
from trimtab.workflows.triage._routing import is_routing, routing_notes, same_sets
from trimtab.workflows.triage._rows import find_rows, strips
from trimtab.workflows.triage._source import SourceMap, look_up, make_fix, place, suspect_hunk
from trimtab.workflows.triage._tensors import Tensor, read_tensors
from trimtab.workflows.triage._transplant import Candidate, find_candidate, open_candidate, transplant

__all__ = ["transplant", "triage"]

_CALLS = 400


def triage(
    reference: Trace | str | Path,
    candidate: Trace | str | Path,
    *,
    revisions: str | None = None,
    repo: str | Path | None = None,
    source_map: str | Path | None = None,
    transplant: str | Candidate | None = None,
    jobs: int = 1,
    **options: Any,
) -> Triage:
    """Find the module that made the first error, its code, how that code changed, and a patch.

    Phases are walked in causal order (inference, fwd_only, fwd_bwd, others), then in the order of execution. The first
    trustworthy divergence is what made an error out of inputs that agree, not what shows it first.

    Args:
        reference: the run that is trusted; a trace or its path.
        candidate: the run under test.
        revisions: "BASE..HEAD" whose difference explains the change, or "BASE" against the working tree; None takes
            the commits that the manifests name.
        repo: a folder of the repository; None takes that of the suspect's file.
        source_map: a YAML list of {phase, tensor, file}: where tensors of imported dumps are made.
        transplant: a function (or "module:function") that returns the candidate's model and a function of no arguments
            that runs it once as it was recorded; the suspect's tensor is then replaced by the reference's.
        jobs: processes that compare.
        options: those of `plan_comparison`: verdict, rules, noise, waive, expect, dims, ...

    Returns:
        The triage; `divergence` is None when every pair passes.

    Raises:
        InputError: no such option, or one, a source map or a transplant that cannot be used.
        ComparisonError: the runs cannot be compared.
        TraceError: a path that is no trace.

    Example:
        >>> print(triage("runs/ref", "runs/cand", revisions="v1..HEAD").reason)  # doctest: +SKIP
    """
    base, head = _revisions(revisions)
    mapped = SourceMap.read(source_map) if source_map is not None else None
    build = find_candidate(transplant) if isinstance(transplant, str) else transplant
    name = transplant if isinstance(transplant, str) else getattr(transplant, "__name__", "the function")
    again = open_candidate(build, name) if build is not None else None
    plan = plan_comparison(reference, candidate, **_known(options))
    comparison = run(plan, jobs=jobs)
    tensors = read_tensors(plan, comparison)
    judged = [one for one in tensors if not (is_routing(one) and one.failed and same_sets(one, *_traces(plan)))]
    calls = build_calls(judged)
    found = locate(judged, calls)
    unread = _unread(plan)
    notes = [*check_lengths(tensors, *_traces(plan)), *routing_notes(tensors, *_traces(plan)), *unread]
    if found is None:
        return Triage(
            passed=comparison.passed,
            reason=_nothing(comparison),
            next_check="record the tensors whose digests differ again, with their values" if unread else "",
            notes=tuple(notes),
            **_common(plan, comparison),
        )
    if revisions is None:
        base, head = _commits(plan)
    prints = _fingerprints(found, calls, plan)
    source, hunk, said = _source(found, judged, prints, mapped, Path(repo) if repo is not None else None, base, head)
    moved = _transplant(found, plan, *again) if again is not None else None
    result = _diverged(found, judged, calls, prints, (source, hunk, moved), plan, comparison)
    return replace(result, notes=(*notes, *said))


def _diverged(
    found: Found,
    tensors: Sequence[Tensor],
    calls: Sequence[Call],
    prints: Sequence[Fingerprint],
    evidence: tuple[SourceReference | None, Hunk | None, Transplanted | None],
    plan: ComparisonPlan,
    comparison: Comparison,
) -> Triage:
    """The result of two runs that differ."""
    source, hunk, moved = evidence
    common = _common(plan, comparison)
    where = find_rows(found.tensor, plan)
    sentence = _explain.describe(found, tensors, prints, where.text if where is not None else "")
    near, left_out = _near(calls, found)
    known = groups_known(plan.reference.manifest, plan.candidate.manifest)
    return Triage(
        passed=False,
        reason=sentence,
        divergence=_explain.to_divergence(found, tensors, prints, where, sentence),
        severity=_explain.severity_of(found.tensor),
        likely_cause=_explain.likely_cause(found, prints, hunk, common["manifest"]),
        next_check=_explain.next_step(found, source, hunk, moved, comparison.passed),
        calls=tuple(call.result(found.path) for call in near),
        calls_left_out=left_out,
        ruled_out=_explain.rule_out(found, tensors, common["manifest"], known),
        micro_batches=micro_batches(tensors, plan.reference.trace),
        source=source,
        transplant=moved,
        fix=_fix(hunk, source, moved, found),
        heat=_explain.heat_map(tensors, found),
        strips=strips(tensors, found.tensor, plan) if found.origin != "inputs" else (),
        **common,
    )


def _common(plan: ComparisonPlan, comparison: Comparison) -> dict[str, Any]:
    """What every result says, whether something diverged or not."""
    return {
        "reference": comparison.reference,
        "candidate": comparison.candidate,
        "verdict": comparison.verdict,
        "manifest": compare_manifests(plan.reference.manifest, plan.candidate.manifest),
        "pairs": len(comparison.records),
        "failing": len(comparison.failing()),
        "warnings": comparison.warnings,
    }


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a comparison.

    Raises:
        InputError: it has no such option.
    """
    known = [name for name, one in signature(plan_comparison).parameters.items() if one.kind is one.KEYWORD_ONLY]
    if unknown := sorted(options.keys() - set(known)):
        raise InputError(f"triage has no option {unknown[0]!r}; of a comparison it takes {', '.join(known)}")
    return options


def _traces(plan: ComparisonPlan) -> tuple[Trace, Trace]:
    return plan.reference.trace, plan.candidate.trace


def _revisions(text: str | None) -> tuple[str, str]:
    """Read BASE..HEAD.

    Raises:
        InputError: an empty or dashed revision.
    """
    base, dots, head = (text or "").partition("..")
    head = head.removeprefix(".")
    if text is not None and (not base or base.startswith("-") or head.startswith("-") or (dots and not head)):
        raise InputError(f"revisions {text!r}: write BASE..HEAD, or BASE to compare with the working tree")
    return base, head


def _commits(plan: ComparisonPlan) -> tuple[str, str]:
    """The commits that the manifests name, when they are two; a dirty candidate means its working tree."""
    sides = [side.manifest.get("provenance") or {} for side in (plan.reference, plan.candidate)]
    base, head = (str(side.get("git_commit") or "") for side in sides)
    if sides[1].get("git_dirty"):
        return base, ""
    return (base, head) if base and head and base != head else ("", "")


def _unread(plan: ComparisonPlan) -> list[str]:
    """One line about tensors of which only digests were kept, and these differ: how much, nobody can say."""
    pairs = [pair for pair in plan.matched.pairs if not pair.same_digest and not pair.stored]
    if not pairs:
        return []
    first = min(pairs, key=lambda pair: pair.order)
    many = f"the digests of {len(pairs)} tensors" if len(pairs) > 1 else "the digest of one tensor"
    return [f"{many} may differ and no values were kept; the first in execution order is {first.key.text}"]


def _nothing(comparison: Comparison) -> str:
    return (
        f"nothing diverges: {comparison.reason}" if comparison.passed else f"no pair differs, but {comparison.reason}"
    )


def _fingerprints(found: Found, calls: Sequence[Call], plan: ComparisonPlan) -> tuple[Fingerprint, ...]:
    """What the comparison recognised and what shows only beside the inputs, best first."""
    at_hand = (*found.sources, *ingredients(found, calls))
    context = find_in_context(found.tensor, at_hand, *_traces(plan)) if found.origin in ("module", "between") else ()
    every = (*found.tensor.record.fingerprints, *context)
    return tuple(sorted(every, key=lambda one: -round(one.explained, 2)))[:4]


def _source(
    found: Found, tensors: Sequence[Tensor], prints: Sequence[Fingerprint], mapped: SourceMap | None,
    repo: Path | None, base: str, head: str,
) -> tuple[SourceReference | None, Hunk | None, list[str]]:  # fmt: skip
    if found.origin == "inputs":
        return None, None, []
    where = place(found, tensors, mapped)
    if where is None:
        return None, None, ["source: the records name no file; give a source map, or record with module hooks"]
    source, notes = look_up(where, prints, repo=repo, base=base, head=head)
    return source, suspect_hunk(source, prints), notes


def _transplant(found: Found, plan: ComparisonPlan, model: nn.Module, once: Callable[[], object]) -> Transplanted:
    """The transplant of the suspect; one that fails is told with the rest of what was found."""
    trace, key = plan.reference.trace, found.tensor.record.key
    try:
        return transplant(model, once, reference=trace, key=key, module_path=found.path or "")
    except TrimtabError as error:
        return Transplanted(site=key.site or key.name, agrees=False, reproduced=False, reason=f"not made: {error}")


def _near(calls: Sequence[Call], found: Found) -> tuple[list[Call], int]:
    """The calls of the divergence's pass, around it."""
    same = [
        call
        for call in calls
        if call.outputs[0].group == found.tensor.group and call.direction == found.tensor.direction
    ]
    at = next((index for index, call in enumerate(same) if call.outputs[0].place >= found.tensor.place), 0)
    start = max(0, at - _CALLS // 2)
    kept = same[start : start + _CALLS]
    return kept, len(same) - len(kept)


def _fix(hunk: Hunk | None, source: SourceReference | None, moved: Transplanted | None, found: Found) -> Fix | None:
    """A transplant proves the place; it proves a change where that is the only one of the suspect's own code."""
    if hunk is None or source is None:
        return None
    placed = moved is not None and moved.agrees and moved.reproduced
    own = [one for one in source.hunks if one.distance == 0]
    site = found.tensor.name
    if placed and own == [hunk]:
        more = (
            f" and those of {len(moved.alike)} more modules of its class" if moved is not None and moved.alike else ""
        )
        why = f"with the reference's {site}{more} everything behind agrees, and this is the only change of its code"
    elif placed:
        count = f"{len(own)} changes" if own else "no change"
        why = f"a transplant proves the place, whose code has {count} in {source.revision}"
    elif moved is not None and moved.reproduced:
        why = f"with the reference's {site} what follows still differs"
    else:
        why = f"no transplant of {site} was made" if moved is None else moved.reason
    return make_fix(hunk, proved=placed and own == [hunk], why=why)
