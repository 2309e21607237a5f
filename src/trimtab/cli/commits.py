"""`trimtab commits`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trimtab.cli._call import Call, LineOutput, run
from trimtab.cli._options import given


def commits(
    revisions: str,
    /,
    *command: str,
    plan: Path | None = None,
    repo: Path | None = None,
    out: Path = Path("runs/commits"),
    setup: str | None = None,
    seed: int | None = None,
    steps: str | None = None,
    time_limit: float | None = None,
    from_commit: Annotated[str | None, Parameter(name="--from")] = None,
    bisect: Annotated[bool, Parameter(negative="")] = False,
    plan_only: Annotated[bool, Parameter(negative="")] = False,
    first_parent: Annotated[bool, Parameter(negative="")] = False,
    html: Path | None = None,
    output: LineOutput = LineOutput(),
) -> int:
    """Test a numerical change commit by commit: red flags, risk, first bad commit.

    Args:
        revisions: BASE..HEAD; BASE is the trusted commit.
        command: after --, what to run at each commit; {steps} {seed} {out} {worktree} are filled in.
        plan: a plan file instead of a command.
        repo: a directory of the repository (default: here).
        out: directory of the walk; the same one goes on where it stopped.
        setup: a line for the shell that installs a worktree.
        seed: fills {seed}.
        steps: test length, or lengths by risk such as LOW=2,MEDIUM=10,HIGH=50.
        time_limit: seconds for one command or setup.
        from_commit: run this commit and the later ones again.
        bisect: find the first bad commit in about log2 of the range.
        plan_only: rate the commits and propose a plan, and run nothing.
        first_parent: follow first parents; a merge is one change.
        html: also write the report there.
    """
    kwargs = given(
        plan=plan,
        repo=repo,
        setup=setup,
        seed=seed,
        steps=steps,
        time_limit=time_limit,
        from_commit=from_commit,
        bisect=bisect,
        plan_only=plan_only,
        first_parent=first_parent,
    )
    args = (revisions, command) if command else (revisions,)
    call = Call(function="trimtab.commits", args=args, kwargs={"out": out, **kwargs})
    return run(call, output, html=html, stream="on_commit")
