"""What the pages of trainings, sweeps of learning rates and queues say: one view, rendered as text and as HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from trimtab.report import _format as fmt
from trimtab.report import _html
from trimtab.report._commits import HEIGHT, WIDTH, Curve, Panel
from trimtab.report._console import MAX_LINES, TextPage
from trimtab.results.training import QueueEstimate, QueueRun, RateSweep, Training, TrainingRow

TrainingResult = Training | RateSweep | QueueRun | QueueEstimate
RESULTS = (Training, RateSweep, QueueRun, QueueEstimate)
_LOG_RATIO = 30.0
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table; a heading that begins with ">" belongs to a column of numbers."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingView:
    """Everything that such a page says."""

    kicker: str
    headline: str
    lede: str
    answers: tuple[tuple[str, str, str, str], ...]
    """(question, short answer, detail, tone)."""
    tables: tuple[Table, ...]
    panels: tuple[Panel, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    keys: tuple[tuple[str, str], ...] = (("", "this training"), ("base", "unsteered model"))
    """(kind of curve, what it is)."""


def view(result: TrainingResult) -> TrainingView:
    """Read a result into sentences, tables and panels."""
    if isinstance(result, Training):
        return _training(result)
    if isinstance(result, RateSweep):
        return _sweep(result)
    return _queue(result) if isinstance(result, QueueRun) else _estimate(result)


def render(result: TrainingResult, *, width: int, color: bool) -> str:
    """Return the text form."""
    return text_of(view(result), width=width, color=color)


def text_of(seen: TrainingView, *, width: int, color: bool) -> str:
    """Return the text form of a view."""
    page = TextPage(width, color)
    page.line(seen.headline, "bold")
    page.line(seen.lede, "dim")
    page.line("")
    for question, short, detail, tone in seen.answers:
        page.item(f"{question} {short}", detail, {"good": "green", "bad": "red"}.get(tone, ""))
    for table in seen.tables:
        page.table(table.title, table.heads, table.rows[:MAX_LINES], left_out=len(table.rows) - MAX_LINES)
    if seen.notes:
        page.line("")
    page.lines((f"note: {one}" for one in seen.notes), "yellow")
    page.facts(dict(seen.facts))
    return page.text()


def render_html(result: TrainingResult) -> str:
    """Return the page."""
    created = str(result.provenance.get("created", "")) if isinstance(result, Training) else ""
    return page_of(view(result), created)


def page_of(seen: TrainingView, created: str = "") -> str:
    """Return the page of a view."""
    curves = [("curves", "Curves")] if seen.panels else []
    return _html._page(
        "training.html.j2",
        scripts={},
        style=_html._asset("report.css") + _html._asset("commits.css"),
        title=seen.headline,
        created=created,
        sections=[("answer", "Answer"), *curves, ("record", "Figures")],
        view=seen,
    )


def _training(one: Training) -> TrainingView:
    validation, counts = one.validation, one.counts
    config = one.config
    sites = ", ".join(each.site for each in one.maps)
    if one.improved is None:
        headline = f"{one.name}: trained, and not validated"
    else:
        headline = f"{one.name}: {'better' if one.improved else 'no better'} than the unsteered model"
    answers = []
    if validation is not None:
        short = f"{fmt.number(validation.steered, 4)} against {fmt.number(validation.unsteered, 4)} unsteered"
        prompted = "the data have no prompt to compare with"
        if validation.prompted is not None:
            prompted = f"the prompted model has {fmt.number(validation.prompted, 4)}"
        answers.append(("Validation perplexity?", short, prompted, "good" if one.improved else "bad"))
    if one.test is not None:
        short = f"{fmt.number(one.test.steered, 4)} against {fmt.number(one.test.unsteered, 4)} unsteered"
        better = one.test.steered < one.test.unsteered
        answers.append(("Test perplexity?", short, "measured once, after training", "good" if better else "bad"))
    kept = f"step {one.best_step} of {len(one.steps)}"
    answers.append(("What was kept?", kept, f"training ended: {one.stopped}", "neutral"))
    maps = tuple((each.site, each.kind, f"{each.width:,}", fmt.number(each.norm, 4)) for each in one.maps)
    return TrainingView(
        kicker=f"Training {one.name}",
        headline=headline,
        lede=f"{config['loss']} loss at {sites} of {one.model} ({one.dtype}); what is trained is float32.",
        answers=tuple(answers),
        tables=(Table(title="What was trained", heads=("site", "kind", ">width", ">norm"), rows=maps),),
        panels=_panels(one),
        facts=(
            ("learning rate", f"{config['learning_rate']:g}, {config['schedule']}, warm-up {config['warmup']:g}"),
            ("rows steered", str(config["positions"])),
            ("training data", f"{fmt.count(counts.sequences, 'sequence')}, {counts.targets:,} target tokens"),
            (
                "validation data",
                f"{fmt.count(counts.validation_sequences, 'sequence')}, {counts.validation_targets:,} target tokens",
            ),
            ("cut, dropped", f"{counts.cut:,}, {counts.dropped:,}" if counts.cut or counts.dropped else ""),
            ("time", f"{one.seconds:.1f} s, {one.tokens_per_second:,.0f} tokens/s"),
            ("peak memory", f"{one.peak_memory / 2**20:,.0f} MiB"),
            ("steering digest", one.steering_digest[:16]),
        ),
        notes=one.notes,
    )


def _sweep(sweep: RateSweep) -> TrainingView:
    losses = [(row.learning_rate or 0.0, row.loss) for row in sweep.rows if row.loss is not None]
    panel = panel_of("validation loss", {"other": ("best loss by rate", losses)}, log_x=True)
    return TrainingView(
        kicker=f"Learning rates {sweep.name}",
        headline=f"Best learning rate: {sweep.best_rate:g}",
        lede=f"{sweep.reason}; {fmt.count(len(sweep.rows), 'rate')} on {sweep.model} in {sweep.seconds:.1f} s.",
        answers=(),
        tables=(_rows("Rates", sweep.rows, named=False),),
        panels=() if panel is None else (panel,),
        facts=(),
        notes=tuple(f"rate {row.learning_rate:g}: {row.error}" for row in sweep.rows if row.error),
    )


def _queue(run: QueueRun) -> TrainingView:
    done = sum(row.state == "done" for row in run.rows)
    states = {state: sum(row.state == state for row in run.rows) for state in ("failed", "running", "waiting")}
    rest = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    return TrainingView(
        kicker=f"Queue {run.folder}",
        headline=f"{done} of {fmt.count(len(run.rows), 'set')} trained{f'; {rest}' if rest else ''}",
        lede=f"{run.model}, {fmt.count(run.workers, 'worker')}, {run.seconds:.1f} s in this session.",
        answers=(),
        tables=(_rows("Sets", run.rows, named=True),),
        panels=(),
        facts=(("kept in", run.path), ("go on with", run.next_command)),
        notes=tuple(f"{row.name}: {row.error}" for row in run.rows if row.error),
    )


def _estimate(found: QueueEstimate) -> TrainingView:
    rows = tuple(
        (one.name, one.state, f"{one.sequences:,}", f"{one.tokens:,}", f"{one.steps:,}", f"{one.seconds:.1f} s")
        for one in found.sets
    )
    bad = sum(bool(one.error) for one in found.sets)
    heads = ("set", "state", ">sequences", ">tokens", ">steps", ">time")
    return TrainingView(
        kicker=f"Estimate {found.folder}",
        headline=f"{_time(found.seconds)} on one worker"
        + (f"; {bad} of {len(found.sets)} cannot be trained" if bad else ""),
        lede=f"{found.tokens:,} tokens on {found.model}; at most, since early stopping is not foreseen.",
        answers=(),
        tables=(Table(title="Sets", heads=heads, rows=rows),),
        panels=(),
        facts=(("peak memory", f"{found.memory / 2**20:,.0f} MiB in the timed step"),),
        notes=tuple(f"{one.name}: {one.error}" for one in found.sets if one.error),
    )


def _rows(title: str, rows: Sequence[TrainingRow], *, named: bool) -> Table:
    first = "set" if named else ">rate"
    heads = (first, "state", ">unsteered", ">steered", ">prompted", ">loss", ">norm", ">step", "ended", ">time")
    cells = tuple(
        (
            row.name if named else fmt.number(row.learning_rate),
            row.state,
            fmt.number(row.unsteered, 4),
            fmt.number(row.steered, 4),
            fmt.number(row.prompted, 4),
            fmt.number(row.loss, 5),
            fmt.number(row.norm, 4),
            "-" if row.best_step is None else f"{row.best_step}/{row.steps}",
            row.stopped,
            "-" if row.seconds is None else f"{row.seconds:.1f} s",
        )
        for row in rows
    )
    return Table(title=f"{title} (perplexity on the validation)", heads=heads, rows=cells)


def _panels(one: Training) -> tuple[Panel, ...]:
    train = [(float(step.step), step.loss) for step in one.steps]
    checks = [(float(each.step), each.loss) for each in one.evaluations]
    curves: dict[str, tuple[str, Points]] = {"other": ("validation loss", checks)}
    if one.unsteered_loss is not None and one.steps:
        ends = [(0.0, one.unsteered_loss), (float(len(one.steps)), one.unsteered_loss)]
        curves = {"base": ("unsteered", ends), **curves}
    made = [
        panel_of("training loss", {"other": ("loss of each step", train)}),
        panel_of("validation loss", curves) if checks else None,
        panel_of("norm", {"other": ("norm of all vectors", [(float(step.step), step.norm) for step in one.steps])}),
        panel_of("gradient norm", {"other": ("before limiting", [(float(s.step), s.grad_norm) for s in one.steps])}),
    ]
    return tuple(panel for panel in made if panel is not None)


def panel_of(title: str, curves: dict[str, tuple[str, Points]], *, log_x: bool = False) -> Panel | None:
    """Return curves, by kind, on axes of their own; None without a finite point."""
    points = [point for _, line in curves.values() for point in line]
    values = [y for _, y in points if math.isfinite(y)]
    if not values:
        return None
    low, high = min(values), max(values)
    log = low > 0 and high / low > _LOG_RATIO
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    across, down = _axis(first, last, log_x), _axis(low, high, log)

    def place(point: tuple[float, float]) -> str:
        return f"{round(across(point[0]) * WIDTH, 1)} {round((1 - down(point[1])) * HEIGHT, 1)}"

    def path(line: Points) -> str:
        pieces = [list(part) for finite, part in groupby(line, lambda point: math.isfinite(point[1])) if finite]
        return "".join("M" + "L".join(map(place, piece)) + ("h.1" if len(piece) == 1 else "") for piece in pieces)

    unit = "rate" if log_x else "step"
    ends = (first,) if first == last else (first, last)
    marks = (low,) if low == high else (low, high)
    return Panel(
        title=title,
        log=log,
        curves=tuple(
            Curve(kind=kind, title=f"{label}: {fmt.number(line[-1][1], 5)} at {unit} {line[-1][0]:g}", path=path(line),
                  crosses=())
            for kind, (label, line) in curves.items() if line
        ),
        x_ticks=tuple((round(across(x) * WIDTH, 1), f"{unit} {x:g}" if x == first else f"{x:g}") for x in ends),
        y_ticks=tuple((round((1 - down(y)) * HEIGHT, 1), fmt.number(y)) for y in marks),
        description=f"{title} by {unit}",
    )  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds:.1f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _axis(low: float, high: float, log: bool) -> Callable[[float], float]:
    """A map of values to 0..1; a single value stands in the middle."""
    a, b = (math.log(low), math.log(high)) if log else (low, high)
    if not b > a:
        return lambda value: 0.5
    return lambda value: ((math.log(value) if log else value) - a) / (b - a)
