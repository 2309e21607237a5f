"""Hold the runs of one commit against the rules: red flags, and how far metrics and traces moved."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.results import Comparison
from trimtab.results.commits import FlagKind, MetricChange, RedFlag, TraceChange
from trimtab.workflows.commits import _course
from trimtab.workflows.commits._metrics import Metrics
from trimtab.workflows.commits._runs import Ran
from trimtab.workflows.commits.plan import Check

NOISE_LIMIT = 4.0
"""A metric that moved by more than this multiple of the base's noise has diverged; traces are judged by the same."""
SAME_AS_BEFORE = "a commit of LOW risk changes no number"
LATE = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """What two runs of one command at the base differ by."""

    metrics: Mapping[str, float]
    """Largest |a - b|, by metric."""
    traces: tuple[Path, Path] | None
    """Both traces, when they measure rounding: the plan gave a command that shows it."""
    moving: frozenset[str] | None
    """Tensors that a plain repeat does not give to the bit: nobody seeds them. None: not measured."""
    wandering: frozenset[str]
    """Those of them that fail the verdict; they are no evidence against a commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Others:
    """The runs that a commit may be held against, by (command, steps); each with the commit's short id."""

    base: Mapping[tuple[str, int], tuple[str, Ran]]
    previous: Callable[[str, int], tuple[str, Ran] | None]
    noise: Mapping[str, Noise]


@dataclass(slots=True)
class Findings:
    """What judging one commit gathers."""

    flags: list[RedFlag] = field(default_factory=list)
    metric_changes: list[MetricChange] = field(default_factory=list)
    trace_changes: list[TraceChange] = field(default_factory=list)


def judge(
    runs: Sequence[Ran], rules: Sequence[Check], checks: Sequence[Check], others: Others, *, same_as_before: bool
) -> Findings:
    """Judge the runs of a commit.

    Args:
        runs: of its commands, at its own length.
        rules: asked of every commit; one that applies to nothing here is passed over when its name is a glob.
        checks: asked of this commit alone; each must apply to something.
        others: earlier runs.
        same_as_before: also ask that nothing moved from the commit before.
    """
    found = Findings()
    judge_one = _Judge(runs, others, found)
    for ran in runs:
        if not ran.ok:
            where = f"{ran.run.directory}/command.stderr" if ran.run.status != "setup" else "setup.stderr"
            judge_one.flag("error", "the command ends well", ran, f"{ran.run.detail} (see {where})")
    for rule in rules:
        judge_one.check(rule, must_apply=not rule.trace and not any(one in rule.metric for one in "*?["), own=False)
    for check in checks:
        judge_one.check(check, must_apply=True, own=True)
    judge_one.compare_with_previous(same_as_before)
    return found


def excuse(flags: Sequence[RedFlag], expected: Sequence[str]) -> list[RedFlag]:
    """Return the flags with those that the plan expected excused, and one more for each that did not come."""
    done = list(flags)
    for text in expected:
        kind, _, pattern = text.partition(":")
        hits = [one for one in done if one.kind == kind and re.search(pattern.strip(), one.text)]
        done = [replace(one, excused=True) if one in hits else one for one in done]
        if not hits:
            what = f"the plan expected {text!r} here, and it did not happen"
            done.append(RedFlag(kind="expected", rule=f"expect {text}", command="", text=what))
    return done


class _Judge:
    def __init__(self, runs: Sequence[Ran], others: Others, found: Findings) -> None:
        self._runs, self._others, self._found = runs, others, found
        self._compared: dict[tuple[str, str], Comparison | str] = {}

    def flag(
        self, kind: FlagKind, rule: str, ran: Ran, text: str, metric: str = "", at: tuple[int, float] | None = None
    ) -> None:
        step, value = at if at is not None else (None, None)
        command = ran.run.command
        self._found.flags.append(
            RedFlag(kind=kind, rule=rule, command=command, text=text, metric=metric, step=step, value=value)
        )

    def check(self, check: Check, *, must_apply: bool, own: bool) -> None:
        """Raise a flag for everything that does not hold."""
        applied = False
        for ran in self._runs:
            if not fnmatchcase(ran.run.command, check.command):
                continue
            if check.trace:
                applied |= ran.trace is not None
                self._trace(check, ran, own)
                continue
            for name, points in ran.metrics.items():
                if fnmatchcase(name, check.metric):
                    applied = True
                    self._metric(check, ran, name, points, own)
        ended_well = [ran for ran in self._runs if ran.ok]
        if must_apply and not applied and ended_well:
            have = ", ".join(sorted({name for ran in ended_well for name in ran.metrics})) or "none"
            what = "wrote no trace" if check.trace else f"there is no such metric; metrics: {have:.200}"
            self.flag("missing", check.text, ended_well[0], what)

    def compare_with_previous(self, same_as_before: bool) -> None:
        """Measure how far every metric moved; flag what vanished, and any move where none may be."""
        for ran in self._runs:
            name = ran.run.command
            before = self._others.previous(name, ran.run.steps)
            if before is None or not ran.ok:
                continue
            sha, other = before
            noise = self._others.noise.get(name)
            if other.trace is not None and ran.trace is None:
                self.flag("missing", "no trace vanishes", ran, f"no trace was written; {sha} wrote one")
            for metric in sorted(other.metrics.keys() - ran.metrics.keys()):
                self.flag("missing", "no metric vanishes", ran, f"{metric} is gone; {sha} had it", metric)
            for metric in sorted(ran.metrics.keys() & other.metrics.keys()):
                size = noise.metrics.get(metric) if noise is not None else None
                change = _moved(name, metric, sha, ran.metrics, other.metrics, size)
                if change is None:
                    continue
                self._found.metric_changes.append(change)
                if same_as_before and change.max_abs > NOISE_LIMIT * (size or 0.0):
                    text = f"{metric} moves by {change.max_abs:.3g} from {sha}{_noise_words(size)}"
                    self.flag("changed", SAME_AS_BEFORE, ran, text, metric, _at(change))
            if same_as_before and noise is not None and noise.moving is not None:
                made = self._compare(ran, (sha, other), identical=True)
                if isinstance(made, TraceChange) and not made.passed:
                    self.flag("changed", SAME_AS_BEFORE, ran, f"trace against {sha}: {made.reason}")

    def _metric(self, check: Check, ran: Ran, name: str, points: Sequence[tuple[int, float]], own: bool) -> None:
        def bad(kind: FlagKind, text: str, at: tuple[int, float] | None) -> None:
            self.flag("check" if own and kind in ("bound", "range") else kind, check.text, ran, text, name, at)

        wrong = next((one for one in points if not math.isfinite(one[1])), None)
        if check.finite and wrong is not None:
            bad("nonfinite", f"{name} is {wrong[1]} at step {wrong[0]}", wrong)
        for at in _outside(_where(points, check.at), check.min, check.max):
            limit = (
                f"below {check.min:g}" if check.min is not None and not at[1] >= check.min else f"above {check.max:g}"
            )
            bad("bound", f"{name} is {at[1]:.6g} at step {at[0]}, {limit}", at)
        if check.pattern:
            seen = _course.find(check.pattern, points)
            if seen is not None:
                bad("pattern", f"{name} shows {check.pattern}: {seen[1]:.6g} at step {seen[0]}", seen)
        if check.factor is not None:
            base = self._others.base.get((ran.run.command, ran.run.steps))
            limits = _widened(base[1].metrics.get(name, ()), check.factor) if base is not None else None
            low, high = limits or (None, None)
            for at in _outside(points, low, high):
                bad("range", f"{name} is {at[1]:.4g} at step {at[0]}, outside {low:.4g} to {high:.4g}", at)
        if check.equal or check.like:
            self._metric_like(check, ran, name, own)

    def _metric_like(self, check: Check, ran: Ran, name: str, own: bool) -> None:
        other = self._other(check.equal or check.like, ran)
        if other is None or name not in other[1].metrics:
            if own and other is None:
                text = f"no run of {ran.run.steps} steps of {check.equal or check.like} to compare with"
                self.flag("missing", check.text, ran, text, name)
            return
        sha, reference = other
        noise = self._others.noise.get(ran.run.command)
        size = noise.metrics.get(name) if noise is not None else None
        change = _moved(ran.run.command, name, sha, ran.metrics, reference.metrics, size)
        if change is None:
            self.flag("missing", check.text, ran, f"{name} has no step in common with {sha}", name)
            return
        if check.equal:
            wrong = change.max_abs > 0
        elif check.within is not None:
            wrong = not change.max_rel <= check.within
        else:
            wrong = change.max_abs > NOISE_LIMIT * (size or 0.0)
        if wrong:
            kind: FlagKind = "check" if own else "diverged"
            text = f"{name} is {change.max_abs:.3g} ({change.max_rel:.2g} relative) away from {sha}{_noise_words(size)}"
            self.flag(kind, check.text, ran, text, name, _at(change))

    def _trace(self, check: Check, ran: Ran, own: bool) -> None:
        other = self._other(check.equal or check.like, ran)
        if ran.trace is None or not ran.ok:
            return
        if other is None or other[1].trace is None:
            if own:
                self.flag("missing", check.text, ran, f"{check.equal or check.like} has no trace to compare with")
            return
        made = self._compare(ran, other, identical=bool(check.equal))
        if isinstance(made, str):
            self.flag("check" if own else "diverged", check.text, ran, made)
        elif not made.passed:
            text = f"trace against {other[0]}: {made.reason}"
            self.flag("check" if own else "diverged", check.text, ran, text)

    def _other(self, name: str, ran: Ran) -> tuple[str, Ran] | None:
        key = (ran.run.command, ran.run.steps)
        if name == "base":
            return self._others.base.get(key)
        if name == "previous":
            return self._others.previous(*key)
        return next(((name, one) for one in self._runs if one.run.command == name), None)

    def _compare(self, ran: Ran, other: tuple[str, Ran], *, identical: bool) -> TraceChange | str:
        """Say what two traces, compared once, differ by; a text is why they cannot be compared."""
        sha, reference = other
        if ran.trace is None or reference.trace is None:
            return "there is no trace on both sides"
        key = (ran.run.command, sha)
        noise = self._others.noise.get(ran.run.command)
        if key not in self._compared:
            self._compared[key] = compared(reference.trace, ran.trace, noise)
        made = self._compared[key]
        if isinstance(made, str):
            return made
        moving = (noise.moving if noise is not None else None) or frozenset()
        change = trace_change(ran.run.command, sha, made, identical, moving)
        told = self._found.trace_changes
        before = next((one for one in told if (one.command, one.against) == key), None)
        if before is None:
            told.append(change)
        elif before.passed:  # only the demand for equal bits fails: one line a pair of traces
            told[told.index(before)] = change
        return change


def compared(reference: Path, candidate: Path, noise: Noise | None = None) -> Comparison | str:
    """Compare two traces; a text, in one line, is why they cannot be."""
    from trimtab.compare import compare  # loads torch: a walk without traces does without

    try:
        traces = None if noise is None else noise.traces
        plain = compare(reference, candidate, noise=traces)
        there = {one.key.tensor for one in plain.records} & (noise.wandering if noise is not None else frozenset())
        if plain.passed or not there:
            return plain
        return compare(reference, candidate, noise=traces, waive=[f"failed:{_literal(one)}" for one in sorted(there)])
    except TrimtabError as error:
        return f"the traces cannot be compared: {error}"


def trace_change(
    command: str, against: str, made: Comparison, identical: bool, moving: frozenset[str] = frozenset()
) -> TraceChange:
    """Return what a comparison says; with `identical`, anything but equal bits fails, `moving` tensors aside."""
    same = sum(one.status == "identical" for one in made.records)
    unequal = [one for one in made.records if one.status != "identical" and one.key.tensor not in moving]
    failing = len(unequal) if identical else sum(not one.passing for one in made.records)
    first = made.first_divergence
    passed, reason, where = made.passed, made.reason, "" if first is None else first.text
    if identical and (failing or not made.passed):
        moved = min(unequal, key=lambda one: one.order, default=None)
        where = moved.key.text if moved is not None else where
        passed = False
        reason = (
            f"{failing} of {len(made.records)} tensors are not equal to the bit, first {where}" if moved else reason
        )
    return TraceChange(
        command=command,
        against=against,
        passed=passed,
        pairs=len(made.records),
        identical=same,
        failing=failing,
        first=where,
        reason=reason,
    )


def measure_noise(first: Ran, second: Ran, *, plain_repeat: bool) -> Noise:
    """Return what two runs of the base differ by."""
    changes = {
        name: _moved("", name, "", second.metrics, first.metrics, None)
        for name in first.metrics.keys() & second.metrics.keys()
    }
    traces = (first.trace, second.trace) if first.trace is not None and second.trace is not None else None
    moving: frozenset[str] | None = None
    wandering: frozenset[str] = frozenset()
    if traces is not None and plain_repeat:
        made = compared(*traces)
        if not isinstance(made, str):
            moving = frozenset(one.key.tensor for one in made.records if one.status != "identical")
            wandering = frozenset(one.key.tensor for one in made.records if not one.passing)
    return Noise(
        metrics={name: one.max_abs for name, one in changes.items() if one is not None},
        traces=None if plain_repeat else traces,
        moving=moving,
        wandering=wandering,
    )


def _moved(
    command: str, metric: str, against: str, mine: Metrics, theirs: Metrics, noise: float | None
) -> MetricChange | None:
    """How far a metric moved, on the steps that both have; None when they share none."""
    ours, other = (_numbered(one[metric]) for one in (mine, theirs))
    both = [key for key in ours if key in other]
    if not both:
        return None
    known = [other[key] for key in both if math.isfinite(other[key])]
    floor = 1e-2 * math.sqrt(sum(one * one for one in known) / len(known)) if known else 0.0
    worst, relative, place = 0.0, 0.0, None
    for key in both:
        a, b = ours[key], other[key]
        if a == b or (math.isnan(a) and math.isnan(b)):
            continue
        gap = abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf
        size = max(abs(b), floor) if math.isfinite(b) else math.inf
        relative = max(relative, gap / size if size and math.isfinite(size) else math.inf)
        if gap > worst:
            worst, place = gap, key[0]
    return MetricChange(
        command=command,
        metric=metric,
        against=against,
        steps=len(both),
        max_abs=worst,
        max_rel=relative,
        at_step=place,
        noise=noise,
    )


def _numbered(points: Sequence[tuple[int, float]]) -> dict[tuple[int, int], float]:
    """Values by step and running number within it."""
    seen: dict[int, int] = {}
    found = {}
    for step, value in points:
        seen[step] = seen.get(step, -1) + 1
        found[step, seen[step]] = value
    return found


def _where(points: Sequence[tuple[int, float]], at: str | int) -> Sequence[tuple[int, float]]:
    if at == "first":
        return points[:1]
    if at == "last":
        return points[-1:]
    if isinstance(at, int):
        return [one for one in points if one[0] >= at]
    first, last = points[0][0], points[-1][0]
    return points if at == "any" else [one for one in points if one[0] >= first + LATE * (last - first)]


def _outside(points: Sequence[tuple[int, float]], low: float | None, high: float | None) -> Iterator[tuple[int, float]]:
    """Yield the first point outside; a NaN is outside of every bound."""
    for step, value in points:
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            yield step, value
            return


def _widened(points: Sequence[tuple[int, float]], factor: float) -> tuple[float, float] | None:
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return None
    low, high = min(values), max(values)
    return (low / factor if low > 0 else low * factor), (high * factor if high > 0 else high / factor)


def _literal(name: str) -> str:
    """A glob that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _noise_words(size: float | None) -> str:
    return "" if size is None else f"; two runs of the base differ by {size:.3g}"


def _at(change: MetricChange) -> tuple[int, float] | None:
    return None if change.at_step is None else (change.at_step, change.max_abs)
