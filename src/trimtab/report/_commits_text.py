"""A walk over commits for a terminal: the answer, one row per commit, the red flags."""

from __future__ import annotations

from trimtab.report import _commits
from trimtab.report import _format as fmt
from trimtab.report._console import MAX_LINES, TextPage
from trimtab.results.commits import CommitWalk

_TONE = {"good": "green", "bad": "red", "neutral": ""}
_STYLE = {"passed": "", "flagged": "red", "failed": "red", "untested": "dim"}


def render(walk: CommitWalk, *, width: int, color: bool) -> str:
    """Return the text form of a walk."""
    view = _commits.view(walk)
    page = TextPage(width, color)
    page.line(f"{'Passed' if walk.passed else 'Not passed'}: {walk.reason}", "bold")
    page.line(f"{view.revisions} of {walk.repository}", "dim")
    page.line("")
    for question, short, detail, tone in view.answers:
        page.item(f"{question} {short}", detail, _TONE[tone])
    shown = view.rows[:MAX_LINES]
    cells = [
        (
            row.sha,
            ("base: " if row.is_base else "") + fmt.one_line(row.subject, 40),
            row.risk,
            row.steps,
            row.seconds,
            row.main,
            row.moved,
            row.trace,
            f"{row.label}{' <- first bad' if row.is_first_bad else ''}",
        )
        for row in shown
    ]
    heads = ("commit", "subject", "risk", ">steps", ">time", f">{view.main_metric}", ">moved", "trace", "result")
    used = [at for at in range(len(heads)) if any(row[at] for row in cells)]
    page.table(
        "Commits",
        [heads[at] for at in used],
        ([row[at] for at in used] for row in cells),
        left_out=len(view.rows) - MAX_LINES,
        styles=[_STYLE[row.status] for row in shown],
    )
    flags = [one for one in view.flags if not one[-1]]
    if flags:
        page.line("")
        page.line("Red flags", "bold")
        page.lines((f"  {sha} {kind}: {text}" for sha, kind, _, _, text, _ in flags), "red")
    if any(one[-1] for one in view.flags):
        page.line("")
        page.line("As expected", "bold")
        page.lines(f"  {sha} {kind}: {text}" for sha, kind, _, _, text, excused in view.flags if excused)
    if walk.mode == "plan":
        page.line("")
        page.line("Why each risk", "bold")
        page.lines(f"  {row.sha} {risk}: {where} {what}" for row in view.rows for risk, where, what in row.reasons[:3])
    if walk.bisection:
        page.line("")
        page.line("Bisection", "bold")
        page.lines(f"  {one.commit[:12]} {one.verdict}: {one.reason}" for one in walk.bisection)
    if walk.warnings:
        page.line("")
    page.lines((f"note: {one}" for one in walk.warnings), "yellow")
    page.facts({"plan": walk.plan, "kept in": walk.directory, "look next": walk.next_command})
    return page.text()
