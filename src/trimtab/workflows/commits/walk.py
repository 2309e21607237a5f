"""Visit commits one by one, run what the plan says, judge, and sum up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from trimtab._base.progress import Progress
from trimtab.results.commits import BisectStep, CommitOutcome, CommitStatus, RedFlag, Risk, RiskReason
from trimtab.workflows.commits._git import Commit
from trimtab.workflows.commits._judge import Noise, Others, excuse, judge, measure_noise
from trimtab.workflows.commits._runs import Place, Ran
from trimtab.workflows.commits.plan import Command, CommitPlan, Plan

SKIP_CODE = 125
"""Exit code by which a command says that a commit cannot be tested, as `git bisect run` has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """One commit of a walk with its rating; the base has position 0."""

    commit: Commit
    position: int
    risk: Risk
    rated: Risk
    reasons: tuple[RiskReason, ...]
    entry: CommitPlan
    steps: int
    commands: tuple[Command, ...]


@dataclass(slots=True)
class Walker:
    """Runs stops and keeps what they gave.

    Attributes:
        warnings: what a reader should know, in sentences.
    """

    place: Place
    plan: Plan
    stops: Sequence[Stop]
    bar: Progress
    against_base: bool = False
    """In a bisection the commit before is the base."""
    warnings: list[str] = field(default_factory=list)
    _ran: dict[int, dict[tuple[str, int], Ran]] = field(default_factory=dict)
    _noise: dict[str, Noise] = field(default_factory=dict)
    _bad: dict[str, set[tuple[str, str, str, str]]] = field(default_factory=dict)
    """What was flagged, by the commit that was first flagged so."""

    def walk(self, tell: Callable[[CommitOutcome], None]) -> list[CommitOutcome]:
        """Test every stop."""
        made = []
        for stop in self.stops:
            made.append(self.visit(stop))
            tell(made[-1])
        return made

    def visit(self, stop: Stop) -> CommitOutcome:
        """Run and judge one stop."""
        self.bar.describe(f"{stop.commit.short} {stop.commit.subject:.40}")
        mine = self._ran.setdefault(stop.position, {})
        with self.place.visit(stop.commit, self.plan) as visit:
            for steps in self._lengths(stop):
                for command in stop.commands:
                    mine[command.name, steps] = visit.run(command, steps)
            if stop.position == 0:
                for name, second in self._noise_commands():
                    first = mine.get((name, stop.steps))
                    if first is not None and first.ok:
                        self._measure(first, visit.run(second, stop.steps, "noise"))
        self.bar.advance()
        return self._outcome(stop, [mine[command.name, stop.steps] for command in stop.commands])

    def _outcome(self, stop: Stop, runs: Sequence[Ran]) -> CommitOutcome:
        others = Others(
            base={key: (self.stops[0].commit.short, ran) for key, ran in self._ran.get(0, {}).items() if ran.ok},
            previous=lambda name, steps: self._previous(stop, name, steps),
            noise=self._noise,
        )
        found = judge(
            runs,
            self.plan.rules,
            stop.entry.checks,
            others,
            same_as_before=stop.risk == "LOW" and stop.position > 0 and not self.against_base,
        )
        flags = excuse(found.flags, stop.entry.expect)
        for ran in runs:
            if ran.ok and not ran.metrics and ran.trace is None:
                self._warn(
                    f"command {ran.run.command!r} shows no metric and wrote no trace at {stop.commit.short}: "
                    "only its exit code was tested"
                )
        return replace(
            planned(stop),
            status=_status(flags, runs),
            summary=self._since(stop, flags) + _summary(flags),
            runs=tuple(ran.run for ran in runs),
            flags=tuple(flags),
            metric_changes=tuple(found.metric_changes),
            trace_changes=tuple(found.trace_changes),
        )

    def _since(self, stop: Stop, flags: Sequence[RedFlag]) -> str:
        """In words, the earlier commit that was flagged for the same, so that one mistake is not taken for many."""
        found = {(str(one.kind), one.rule, one.command, one.metric) for one in flags if not one.excused}
        if not found or self.against_base:
            return ""
        for sha, known in self._bad.items():
            if found <= known and not any(kind in ("diverged", "changed", "error") for kind, *_ in found):
                return f"as since {sha}: "
        self._bad[stop.commit.short] = found
        return ""

    def _lengths(self, stop: Stop) -> list[int]:
        """Its own length, and those at which later commits are compared with it: lengths are never mixed."""
        if stop.position == 0:
            return sorted({one.steps for one in self.stops})
        follows = self.stops[stop.position + 1 : stop.position + 2] if not self.against_base else ()
        return list(dict.fromkeys([stop.steps, *(one.steps for one in follows)]))

    def _previous(self, stop: Stop, name: str, steps: int) -> tuple[str, Ran] | None:
        """The last earlier stop that ran this command well at this length."""
        if stop.position == 0:
            return None
        earlier = (0,) if self.against_base else range(stop.position - 1, -1, -1)
        for position in earlier:
            ran = self._ran.get(position, {}).get((name, steps))
            if ran is not None and ran.ok:
                return self.stops[position].commit.short, ran
        return None

    def _noise_commands(self) -> Iterator[tuple[str, Command]]:
        """The second runs of the base."""
        given: Mapping[str, Command] = {one.name: one for one in self.plan.noise or ()}
        for command in self.plan.commands:
            if self.plan.noise is None or command.name in given:
                yield command.name, given.get(command.name, command)

    def _measure(self, first: Ran, second: Ran) -> None:
        name = first.run.command
        if not second.ok:
            self._warn(f"the noise run of {name!r} did not end well: {second.run.detail}")
            return
        plain = self.plan.noise is None
        noise = measure_noise(first, second, plain_repeat=plain)
        moved = sorted(metric for metric, size in noise.metrics.items() if size > 0)
        if plain and moved:
            worst = f"{moved[0]} by {noise.metrics[moved[0]]:.3g}"
            self._warn(f"two runs of {name!r} at the base differ ({worst}): is everything seeded by {{seed}}?")
        if noise.wandering:
            self._warn(
                f"two runs of {name!r} at the base differ in {', '.join(sorted(noise.wandering)[:5])}; "
                "these are not held against a commit: is everything seeded?"
            )
        if noise.traces is not None:
            same = measure_noise(first, second, plain_repeat=True)
            if same.moving == frozenset():
                self._warn(f"the noise run of {name!r} is bit-identical, so it shows no noise; rounding is assumed")
                noise = replace(noise, traces=None)
        self._noise[name] = noise

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def planned(stop: Stop) -> CommitOutcome:
    """Return what is known of a stop before it runs."""
    return CommitOutcome(
        commit=stop.commit.sha,
        subject=stop.commit.subject,
        author=stop.commit.author,
        date=stop.commit.date,
        position=stop.position,
        status="untested",
        risk=stop.risk,
        risk_source="diff" if stop.risk == stop.rated else "plan",
        risk_reasons=stop.reasons,
        steps=stop.steps,
        intention=stop.entry.intention,
        notes=stop.entry.notes,
    )


def bisect(count: int, visit: Callable[[int], CommitOutcome]) -> tuple[list[tuple[int, BisectStep]], int | None]:
    """Find the first bad one of `count` commits after a base, when all that follow it are bad too.

    Args:
        count: commits after the base; 0 is the base, `count` the head.
        visit: tests one.

    Returns:
        The decisions in their order, and the first bad commit's position (None: the base is bad, or the head good).
    """
    done: list[tuple[int, BisectStep]] = []

    def decide(position: int) -> str:
        outcome = visit(position)
        skipped = any(run.status == "setup" or run.exit_code == SKIP_CODE for run in outcome.runs)
        verdict = "untestable" if skipped else "good" if outcome.status == "passed" else "bad"
        step = BisectStep(commit=outcome.commit, verdict=verdict, reason=outcome.summary)  # type: ignore[arg-type]
        done.append((position, step))
        return verdict

    if decide(0) != "good" or decide(count) != "bad":
        return done, None
    good, bad = 0, count
    skipped: set[int] = set()
    while True:
        inside = [one for one in range(good + 1, bad) if one not in skipped]
        if not inside:
            return done, bad
        middle = (good + bad) / 2
        position = min(inside, key=lambda one: (abs(one - middle), one))
        verdict = decide(position)
        if verdict == "untestable":
            skipped.add(position)
        elif verdict == "good":
            good = position
        else:
            bad = position


def _status(flags: Sequence[RedFlag], runs: Sequence[Ran]) -> CommitStatus:
    left = [one for one in flags if not one.excused]
    if any(one.kind == "error" for one in left):
        return "failed"
    return "flagged" if left else "passed"


def _summary(flags: Sequence[RedFlag]) -> str:
    left = [one for one in flags if not one.excused]
    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    if left:
        return f"{left[0].text}{more}"
    return f"as expected: {flags[0].text}" if flags else "nothing stands out"
