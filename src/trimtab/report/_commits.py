"""What the pages of a walk over commits say, as plain dataclasses: text and HTML render the same ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from trimtab.report import _format as fmt
from trimtab.results.commits import CommitOutcome, CommitWalk, MetricTrack

WIDTH, HEIGHT = 300.0, 120.0
MAX_PANELS = 12
MAX_FLAGS = 500
_LOG_RATIO = 30.0
"""A metric whose values span more than this gets a log axis."""
_STATUS = {"passed": "passed", "flagged": "red flag", "failed": "failed", "untested": "not tested"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One commit, formatted."""

    sha: str
    subject: str
    meta: str
    """Author and day."""
    status: str
    label: str
    risk: str
    risk_note: str
    """Where the rating is from, when it is not the diff."""
    reasons: tuple[tuple[str, str, str], ...]
    """(risk, file and line, what)."""
    steps: str
    seconds: str
    main: str
    """Last value of the main metric."""
    moved: str
    """How far it moved from the commit before."""
    trace: str
    summary: str
    notes: tuple[str, ...]
    is_first_bad: bool
    is_base: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One commit in a panel; `kind` is base, other, bad or first."""

    kind: str
    title: str
    path: str
    crosses: tuple[tuple[float, float], ...]
    """Where it is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One metric over the steps, all commits on the same axes."""

    title: str
    log: bool
    curves: tuple[Curve, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitsView:
    """Everything that a page about a `CommitWalk` says."""

    headline: str
    lede: str
    revisions: str
    answers: tuple[tuple[str, str, str, str], ...]
    """(question, short answer, detail, tone)."""
    main_metric: str
    rows: tuple[Row, ...]
    panels: tuple[Panel, ...]
    panels_left_out: int
    flags: tuple[tuple[str, str, str, str, str, bool], ...]
    """(commit, kind, command, rule, text, excused)."""
    flags_left_out: int
    traces: tuple[tuple[str, str, str, str, str, str, str], ...]
    """(commit, command, against, pairs, identical, failing, first divergence or reason)."""
    several_commands: bool


def view(walk: CommitWalk) -> CommitsView:
    """Read a walk into sentences, table rows and panels."""
    main = _main_metric(walk)
    panels = _panels(walk)
    flags = [
        (one.commit[:12], flag.kind, flag.command, flag.rule, flag.text, flag.excused)
        for one in walk.commits
        for flag in one.flags
    ]
    return CommitsView(
        headline=_headline(walk),
        lede=walk.reason[:1].upper() + walk.reason[1:] + ".",
        revisions=re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", walk.revisions),
        answers=_answers(walk),
        main_metric=main[1] if main else "",
        rows=tuple(_row(walk, one, main) for one in walk.commits),
        panels=tuple(panels[:MAX_PANELS]),
        panels_left_out=max(0, len(panels) - MAX_PANELS),
        flags=tuple(flags[:MAX_FLAGS]),
        flags_left_out=max(0, len(flags) - MAX_FLAGS),
        traces=tuple(
            (one.commit[:12], made.command, made.against, f"{made.pairs:,}", f"{made.identical:,}", f"{made.failing:,}",
             made.first or made.reason)
            for one in walk.commits for made in one.trace_changes
        ),
        several_commands=len({run.command for one in walk.commits for run in one.runs}) > 1,
    )  # fmt: skip


def _headline(walk: CommitWalk) -> str:
    bad = _first_bad(walk)
    if walk.mode == "plan":
        return f"{fmt.count(len(walk.commits) - 1, 'commit')} rated, none run"
    if bad is None:
        return "No commit is bad"
    return "The base itself is bad" if bad.position == 0 else f"{bad.commit[:12]} is the first bad commit"


def _first_bad(walk: CommitWalk) -> CommitOutcome | None:
    return next((one for one in walk.commits if one.commit == walk.first_bad), None)


def _answers(walk: CommitWalk) -> tuple[tuple[str, str, str, str], ...]:
    bad, ledger = _first_bad(walk), walk.ledger
    after = walk.commits[1:]
    risks = {name: sum(one.risk == name for one in after) for name in ("HIGH", "MEDIUM", "LOW")}
    wrong = sum(one.status in ("flagged", "failed") for one in walk.commits)
    kept = f", {ledger.kept} of them kept from before" if ledger.kept else ""
    tested = f"{ledger.tested} of {ledger.expected}"
    by_design = walk.mode == "bisect" and walk.finished
    return (
        (
            "Which commit brought it?",
            "Not known" if walk.mode == "plan" else "None" if bad is None else bad.subject or bad.commit[:12],
            "nothing was run" if walk.mode == "plan" else bad.summary if bad is not None else "no red flag was raised",
            "neutral" if walk.mode == "plan" else "good" if bad is None else "bad",
        ),
        (
            "What was tested?",
            f"{tested} commits",
            f"the base counts{kept}; "
            + (f"{len(walk.bisection)} tests of a bisection" if by_design else f"{fmt.count(wrong, 'bad one')}"),
            "good" if ledger.tested == ledger.expected or by_design else "bad",
        ),
        (
            "How risky is the range?",
            ", ".join(f"{number} {name}" for name, number in risks.items() if number) or "no commit",
            "rated by the syntax trees of what each commit changed",
            "bad" if risks["HIGH"] else "neutral",
        ),
    )


def _row(walk: CommitWalk, one: CommitOutcome, main: tuple[str, str] | None) -> Row:
    track = _track(one, *main) if main else None
    change = next((c for c in one.metric_changes if main and (c.command, c.metric) == main), None)
    traces = one.trace_changes[:1]
    seconds = sum(run.seconds for run in one.runs)
    kept = bool(one.runs) and all(run.kept for run in one.runs)
    notes = [text for text in (one.intention, one.notes) if text]
    return Row(
        sha=one.commit[:12],
        subject=one.subject,
        meta=f"{one.author}, {one.date[:10]}",
        status=one.status,
        label=_STATUS[one.status],
        risk="" if one.position == 0 else one.risk,
        risk_note="from the plan" if one.risk_source == "plan" else "",
        reasons=tuple(
            (reason.risk, f"{reason.file}:{reason.line}" if reason.line else reason.file, reason.what)
            for reason in one.risk_reasons
        ),
        steps=f"{one.steps:,}",
        seconds=("" if not one.runs else f"{fmt.number(seconds, 2)} s") + (" kept" if kept else ""),
        main=fmt.number(track.values[-1], 5) if track is not None and track.values else "",
        moved="" if change is None else "same" if change.max_abs == 0 else f"{fmt.number(change.max_rel, 2)} rel",
        trace="".join(f"{made.identical:,} of {made.pairs:,} identical" for made in traces),
        summary=one.summary,
        notes=tuple(notes),
        is_first_bad=one.commit == walk.first_bad,
        is_base=one.position == 0,
    )


def _keys(walk: CommitWalk) -> list[tuple[str, str]]:
    """(command, metric) in the order in which they first appear."""
    found = (
        (run.command, track.metric) for one in walk.commits for run in one.runs for track in run.metrics if track.values
    )
    return list(dict.fromkeys(found))


def _main_metric(walk: CommitWalk) -> tuple[str, str] | None:
    keys = _keys(walk)
    return next((key for key in keys if "loss" in key[1].lower()), keys[0] if keys else None)


def _track(one: CommitOutcome, command: str, metric: str) -> MetricTrack | None:
    runs = (run for run in one.runs if run.command == command)
    return next((track for run in runs for track in run.metrics if track.metric == metric), None)


def _panels(walk: CommitWalk) -> list[Panel]:
    keys = _keys(walk)
    several = len({command for command, _ in keys}) > 1
    made = []
    for command, metric in keys:
        pairs = [(one, _track(one, command, metric)) for one in walk.commits]
        tracks = [(one, track) for one, track in pairs if track is not None and track.values]
        title = f"{metric} ({command})" if several else metric
        panel = _panel(walk, title, tracks)
        if panel is not None:
            made.append(panel)
    return made


def _panel(walk: CommitWalk, title: str, tracks: Sequence[tuple[CommitOutcome, MetricTrack]]) -> Panel | None:
    values = [value for _, track in tracks for value in track.values if math.isfinite(value)]
    steps = [step for _, track in tracks for step in track.steps]
    if not values:
        return None
    low, high = min(values), max(values)
    log = low > 0 and high / low > _LOG_RATIO
    y = _axis(low, high, log)
    first, last = min(steps), max(steps)
    x = _axis(float(first), float(last), False)

    def across(step: float) -> float:
        return round(x(step) * WIDTH, 1)

    def down(value: float) -> float:
        return round((1 - y(value)) * HEIGHT, 1)

    curves = [_curve(walk, one, track, across, down) for one, track in tracks]
    order = {"other": 0, "base": 1, "bad": 2, "first": 3}
    middle = math.sqrt(low * high) if log else (low + high) / 2
    marks = [low] if low == high else [low, middle, high]
    ends = [first] if first == last else [first, last]
    return Panel(
        title=title,
        log=log,
        curves=tuple(sorted(curves, key=lambda curve: order[curve.kind])),
        x_ticks=tuple((across(step), f"step {step:,}" if step == first else f"{step:,}") for step in ends),
        y_ticks=tuple((down(value), fmt.number(value)) for value in marks),
        description=f"{title} over the steps of {fmt.count(len(tracks), 'commit')}{', log axis' if log else ''}",
    )


def _axis(low: float, high: float, log: bool) -> Callable[[float], float]:
    """A map of values to 0..1; a single value stands in the middle."""
    a, b = (math.log(low), math.log(high)) if log else (low, high)
    if not b > a:
        return lambda value: 0.5
    return lambda value: ((math.log(value) if log else value) - a) / (b - a)


def _curve(
    walk: CommitWalk,
    one: CommitOutcome,
    track: MetricTrack,
    across: Callable[[float], float],
    down: Callable[[float], float],
) -> Curve:
    points = list(zip(track.steps, track.values, strict=True))
    pieces = [list(part) for finite, part in groupby(points, lambda point: math.isfinite(point[1])) if finite]
    path = "".join(
        "M" + "L".join(f"{across(step)} {down(value)}" for step, value in piece) + ("h.1" if len(piece) == 1 else "")
        for piece in pieces
    )
    bad = one.status in ("flagged", "failed")
    kind = "first" if one.commit == walk.first_bad else "bad" if bad else "base" if one.position == 0 else "other"
    return Curve(
        kind=kind,
        title=f"{one.commit[:12]} {one.subject}: {fmt.number(track.values[-1], 5)} at step {track.steps[-1]:,}",
        path=path,
        crosses=tuple((across(step), 0.0) for step, value in points if not math.isfinite(value))[:40],
    )
