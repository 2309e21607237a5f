"""The commit-by-commit test of a numerical change: run each commit in a worktree of its own, and find the bad one."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from trimtab._base.progress import progress
from trimtab.errors import InputError, UnfinishedError
from trimtab.results import to_json
from trimtab.results.commits import BisectStep, CommitLedger, CommitOutcome, CommitWalk, Mode, Risk
from trimtab.results.lines import CommitLine, VerdictLine
from trimtab.workflows._arguments import checked
from trimtab.workflows.commits import risk as risks
from trimtab.workflows.commits._git import Commit, Repository
from trimtab.workflows.commits._runs import PLAN_FILE, Place
from trimtab.workflows.commits.plan import Command, CommitPlan, Plan, check_plan, placed, read_plan, write_plan
from trimtab.workflows.commits.walk import Stop, Walker, bisect, planned

__all__ = ["commits"]

RESULT_FILE = "result.json"
_find_first_bad = bisect
_NOTHING = CommitPlan(commit="")


@checked
def commits(
    revisions: str,
    command: str | Sequence[str] | None = None,
    *,
    plan: str | Path | None = None,
    repo: str | Path = ".",
    out: str | Path = "runs/commits",
    setup: str | None = None,
    seed: int | None = None,
    steps: int | str | None = None,
    time_limit: float | None = None,
    from_commit: str | None = None,
    bisect: bool = False,
    plan_only: bool = False,
    first_parent: bool = False,
    on_commit: Callable[[CommitLine | VerdictLine], None] | None = None,
) -> CommitWalk:
    """Test the commits of a range one by one, each in a git worktree of its own.

    Runs are kept by commit, command and length: the same call again runs only what is missing. The repository's own
    tree is never written.

    Args:
        revisions: BASE..HEAD; BASE is the trusted commit, and is run as well.
        command: what to run at each commit: words, or a line for the shell. `{steps} {seed} {out} {worktree}` are
            filled in, and the trace goes to `{out}/trace` (TRIMTAB_DUMP). None without a plan only rates the commits.
        plan: a plan file instead of a command; see `docs/commits.md`.
        repo: a directory of the repository.
        out: directory of the walk: worktrees, runs, the proposed plan, the result.
        setup: a line for the shell that installs a worktree.
        seed: fills `{seed}`, and PYTHONHASHSEED.
        steps: test length: one number, or by risk as in "LOW=2,HIGH=50".
        time_limit: seconds for one command or setup.
        from_commit: run this commit and the later ones again, whatever is kept of them.
        bisect: find the first bad commit in about log2 of the range, instead of testing every one.
        plan_only: rate the commits and propose a plan, and run nothing.
        first_parent: follow first parents; a merge is one change.
        on_commit: called with each commit as soon as it is judged, and with the verdict last.

    Returns:
        What was found; `passed` when no commit is bad. A bisection stops as soon as it knows; its ledger says what it
        did not test.

    Raises:
        InputError: no repository, an unknown revision, an empty range, a merge commit, options that exclude each other.
        RecipeError: a plan with an unknown field or commit, or an edited proposal in the way.
        UnfinishedError: interrupted; what was run is kept.
        TraceLockedError: another walk works in that directory.

    Example:
        >>> walk = tt.commits("main..HEAD", "python train.py --steps {steps} --seed {seed}")
    """
    if command and plan is not None:
        raise InputError("a command and a plan were both given; the plan holds its own commands: leave one out")
    repository = Repository(repo)
    base, head = _ends(repository, revisions)
    span = repository.range(base.sha, head.sha, first_parent=first_parent)
    chosen = read_plan(plan) if plan is not None else Plan(commands=_commands(command))
    chosen = _changed(chosen, revisions, setup, seed, steps, time_limit)
    chosen = placed(chosen, repository, (base, *span), f"plan {plan}")
    first = _position(repository, from_commit, (base, *span))
    stops = _stops(repository, (base, *span), chosen)
    place = Place(out, repository)
    with place.lock():
        used = Path(plan) if plan is not None else place.propose(_proposal(chosen, stops))
        for stop in stops[first:] if first is not None else ():
            place.forget(stop.commit)
        mode: Mode = "plan" if plan_only or not any(stop.commands for stop in stops) else "bisect" if bisect else "walk"
        try:
            with progress("commits", len(stops)) as bar:
                walker = Walker(place, chosen, _even(stops) if mode == "bisect" else stops, bar, mode == "bisect")
                tell = None if on_commit is None else partial(_tell, on_commit, revisions)
                outcomes, steps_taken, bad = _run(walker, mode, tell or (lambda _: None))
        except KeyboardInterrupt as error:
            raise UnfinishedError(
                f"{place.path} was interrupted; go on with the same command again, finished runs are kept"
            ) from error
        result = _result(walker, mode, outcomes, steps_taken, bad, revisions, repository, base, head, used)
        place.keep(RESULT_FILE, to_json(result) + "\n")
    if on_commit is not None:
        on_commit(VerdictLine(of="commits", passed=result.passed, reason=result.reason, ledger=result.ledger))
    return result


def _tell(on_commit: Callable[[CommitLine | VerdictLine], None], revisions: str, outcome: CommitOutcome) -> None:
    on_commit(CommitLine(revisions=revisions, outcome=outcome))


def _ends(repository: Repository, revisions: str) -> tuple[Commit, Commit]:
    base, dots, head = revisions.partition("..")
    if not dots or not base or head.startswith("."):
        raise InputError(f"revisions is {revisions!r}; write BASE..HEAD, such as main..HEAD or v1.2..my-branch")
    return repository.commit(repository.resolve(base)), repository.commit(repository.resolve(head or "HEAD"))


def _commands(command: str | Sequence[str] | None) -> tuple[Command, ...]:
    if not command:
        return ()
    return (Command(run=command if isinstance(command, str) else tuple(command)),)


def _changed(
    plan: Plan, revisions: str, setup: str | None, seed: int | None, steps: int | str | None, time_limit: float | None
) -> Plan:
    """The plan with what the call says; arguments win over a file."""
    given = {"setup": setup, "seed": seed, "time_limit": time_limit}
    made = replace(plan, revisions=revisions, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    if steps is not None:
        made = replace(made, steps={**made.steps, **_lengths(steps)})
        # One length for all leaves nothing for the entries of a plan to say.
        if isinstance(steps, int) or steps.isdecimal():
            made = replace(made, commits=tuple(replace(one, steps=None) for one in made.commits))
    check_plan(made, "the plan")
    return made


def _lengths(steps: int | str) -> dict[Risk, int]:
    levels: tuple[Risk, ...] = ("LOW", "MEDIUM", "HIGH")
    if isinstance(steps, int) or steps.isdecimal():
        return dict.fromkeys(levels, int(steps))
    found: dict[Risk, int] = {}
    for part in steps.split(","):
        name, _, number = part.strip().partition("=")
        level = next((one for one in levels if one == name.upper()), None)
        if level is None or not number.isdecimal():
            raise InputError(f"steps is {steps!r}; give one number, or lengths by risk such as LOW=2,MEDIUM=10,HIGH=50")
        found[level] = int(number)
    return found


def _position(repository: Repository, revision: str | None, span: Sequence[Commit]) -> int | None:
    if revision is None:
        return None
    sha = repository.resolve(revision)
    found = next((at for at, one in enumerate(span) if one.sha == sha), None)
    if found is None:
        raise InputError(f"--from {revision} ({sha[:12]}) is not in the range {span[0].short}..{span[-1].short}")
    return found


def _stops(repository: Repository, span: Sequence[Commit], plan: Plan) -> list[Stop]:
    """Rate every commit and settle its length; the base runs as long as the longest."""
    made = []
    for position, commit in enumerate(span):
        rated, reasons = risks.rate(repository.changes(commit)) if position else ("LOW", ())
        entry = plan.entry(commit.sha) or _NOTHING
        risk = entry.risk or rated
        made.append(
            Stop(
                commit=commit,
                position=position,
                risk=risk,
                rated=rated,
                reasons=reasons,
                entry=entry,
                steps=entry.steps or plan.steps.get(risk, 1),
                commands=entry.commands or plan.commands,
            )
        )
    return [replace(made[0], steps=max(one.steps for one in made[1:])), *made[1:]]


def _even(stops: Sequence[Stop]) -> list[Stop]:
    """All at one length: in a bisection every commit is held to the same test."""
    longest = max(one.steps for one in stops)
    return [replace(one, steps=longest) for one in stops]


def _proposal(plan: Plan, stops: Sequence[Stop]) -> str:
    entries = tuple(
        CommitPlan(
            commit=stop.commit.short,
            subject=stop.commit.subject,
            risk=stop.risk,
            steps=stop.steps,
            intention=stop.entry.intention,
        )
        for stop in stops[1:]
    )
    comments = {
        stop.commit.short: [
            f"{one.risk}: {one.file}{f':{one.line}' if one.line else ''} {one.what}" for one in stop.reasons[:4]
        ]
        for stop in stops
    }
    shown = replace(plan, commands=plan.commands or (Command(run="python train.py --steps {steps} --seed {seed}"),))
    return write_plan(replace(shown, commits=entries), comments)


_Found = tuple[list[CommitOutcome], list[BisectStep], int | None]


def _run(walker: Walker, mode: Mode, tell: Callable[[CommitOutcome], None]) -> _Found:
    """Return the outcomes in the order of the commits, the decisions, and the position of the first bad commit."""
    if mode == "plan":
        proposed = [planned(stop) for stop in walker.stops]
        for outcome in proposed:
            tell(outcome)
        return proposed, [], None
    if mode == "walk":
        made = walker.walk(tell)
        return made, [], next((one.position for one in made if one.status in ("flagged", "failed")), None)
    tested: dict[int, CommitOutcome] = {}

    def visit(position: int) -> CommitOutcome:
        tested[position] = walker.visit(walker.stops[position])
        tell(tested[position])
        return tested[position]

    decisions, bad = _find_first_bad(len(walker.stops) - 1, visit)
    outcomes = [tested.get(stop.position) or planned(stop) for stop in walker.stops]
    if bad is None and outcomes[0].status != "passed":
        bad = 0
    return outcomes, [step for _, step in decisions], bad


def _result(
    walker: Walker,
    mode: Mode,
    outcomes: Sequence[CommitOutcome],
    decisions: Sequence[BisectStep],
    bad: int | None,
    revisions: str,
    repository: Repository,
    base: Commit,
    head: Commit,
    plan: Path,
) -> CommitWalk:
    tested = [one for one in outcomes if one.status != "untested"]
    left = [one for one in outcomes if one.status == "untested"]
    why = {"walk": "not reached", "plan": "nothing was run", "bisect": "not needed by the bisection"}[mode]
    first = outcomes[bad] if bad is not None else None
    return CommitWalk(
        passed=mode != "plan" and first is None,
        reason=_reason(mode, outcomes, decisions, first),
        finished=mode != "plan",
        mode=mode,
        revisions=revisions,
        repository=str(repository.root),
        base=base.sha,
        head=head.sha,
        directory=str(walker.place.path),
        plan=str(plan),
        seed=walker.plan.seed,
        first_bad=None if first is None else first.commit,
        commits=tuple(outcomes),
        ledger=CommitLedger(
            expected=len(outcomes),
            tested=len(tested),
            kept=sum(all(run.kept for run in one.runs) for one in tested),
            untested=tuple(f"{one.commit[:12]}: {why}" for one in left),
        ),
        rules=tuple(rule.text for rule in walker.plan.rules),
        bisection=tuple(decisions),
        warnings=tuple(walker.warnings),
        next_command=_next(mode, outcomes, first, revisions, walker, repository),
    )


def _reason(
    mode: Mode, outcomes: Sequence[CommitOutcome], decisions: Sequence[BisectStep], first: CommitOutcome | None
) -> str:
    if mode == "plan":
        high = sum(one.risk == "HIGH" for one in outcomes[1:])
        return f"nothing was run: a plan is proposed for {_count(outcomes)}, {high} of HIGH risk"
    if first is None:
        if mode == "bisect":
            return f"nothing to find: {outcomes[-1].commit[:12]}, the last commit, is as good as the base"
        excused = sum(one.excused for outcome in outcomes for one in outcome.flags)
        more = f", {excused} red flags as expected" if excused else ""
        return f"{_count(outcomes)} after the base, none is bad{more}"
    what = f"{first.commit[:12]} ({first.subject}): {first.summary}"
    if first.position == 0:
        return f"the base itself is bad: {what}"
    if mode == "walk":
        bad = sum(one.status in ("flagged", "failed") for one in outcomes)
        return f"the first of {bad} bad commits is {what}" if bad > 1 else f"one bad commit: {what}"
    unclear = sum(one.verdict == "untestable" for one in decisions)
    doubt = f" (or one of {unclear} that could not be tested)" if unclear else ""
    return f"{len(decisions)} tests: the first bad commit is {what}{doubt}"


def _count(outcomes: Sequence[CommitOutcome]) -> str:
    return f"{len(outcomes) - 1} commit{'s' * (len(outcomes) != 2)}"


def _next(
    mode: Mode, outcomes: Sequence[CommitOutcome], first: CommitOutcome | None, revisions: str, walker: Walker,
    repository: Repository,
) -> str:  # fmt: skip
    """The command that goes on from here; the worktrees that the traces name are gone, the repository is not."""
    place = walker.place.path
    if mode == "plan":
        return f"trimtab commits {revisions} --plan {shlex.quote(str(place / PLAN_FILE))}"
    if first is None or first.position == 0:
        return ""
    run = next((one for one in first.runs if one.trace), None)
    change = next((one for one in first.trace_changes if not one.passed), None)
    before = next((one for one in outcomes if change and one.commit.startswith(change.against)), None)
    if run is not None and before is not None:
        other = next((one.trace for one in before.runs if one.trace and one.command == run.command), "")
        if other:
            change_of = f"{before.commit[:12]}..{first.commit[:12]}"
            where = ["--repo", str(repository.root), "--revisions", change_of]
            return shlex.join(["trimtab", "triage", str(place / other), str(place / run.trace), *where])
    return f"git show {first.commit[:12]}"
