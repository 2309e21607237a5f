"""Text of the smaller results: generated texts, sweeps, step tables, findings, and any other result as a table."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.results import DecodeComparison, DoctorReport, GenerationRun, SweepRun

_STATES = {"ok": "green", "missing": "yellow", "untested": "yellow", "broken": "bold red"}


def render(result: object, *, width: int, color: bool) -> str:
    """Render any result dataclass for a terminal."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=color, no_color=not color, highlight=False)
    for kind, show in _SHOW:
        if isinstance(result, kind):
            show(console, result)
            return stream.getvalue()
    _any(console, result)
    return stream.getvalue()


def _generation(console: Console, run: GenerationRun) -> None:
    steered = "unsteered" if not run.steering_digest else f"steered: {run.steering}"
    console.print(f"{escape(run.model)}, {run.backend}, {run.dtype}, {escape(steered)}\n")
    for text in run.texts:
        console.print(f"[dim]{escape(text.prompt)}[/dim]{escape(text.text)}")
        for dose in text.doses:
            note = f"no row: {dose.reason}" if dose.reason else f"{dose.rows} rows"
            console.print(f"  [dim]{dose.op} at {dose.site}: {escape(note)}[/dim]")
    if run.trace:
        console.print(f"\ntrace: {escape(run.trace)}")


def _sweep(console: Console, run: SweepRun) -> None:
    console.print(f"{escape(run.path)}: {escape(run.model)}, {run.num_prompts} prompts, {run.max_tokens} tokens")
    console.print(f"steering: {escape(run.steering)}\n")
    rows = (
        (
            one.label + (" (reference)" if one.label == run.reference else ""),
            one.backend,
            one.model_dtype,
            one.op_math,
            one.free,
            one.forced,
        )
        for one in run.configs
    )
    console.print(_table(("configuration", "backend", "model", "op arithmetic", "free", "forced"), rows))
    if run.next_command:
        console.print(f"\nnext: {escape(run.next_command)}")


def _decode(console: Console, result: DecodeComparison) -> None:
    console.print(f"{result.label} against {result.reference_label}: {result.reason}")
    console.print(f"{escape(result.steering)}\n")
    console.print(f"{result.reference_label}: {escape(result.reference_text)}")
    console.print(f"{result.label}: {escape(result.text)}\n")
    columns = (
        *("step", "reference", "token", "margin", "max before", "rmse before", "max after", "rmse after", "rel_l2"),
        *("ulp", "cap delta", "reference's", "d logprob", "max d", "shared"),
    )
    rows = (
        (
            str(step.step),
            step.reference_token,
            step.token if step.same_token else f"{step.token} *",
            _number(step.reference_margin),
            _number(step.max_abs_before),
            _number(step.rmse_before),
            _number(step.max_abs_after),
            _number(step.rmse_after),
            _number(step.rel_l2_after),
            "" if step.max_ulp_after is None else str(step.max_ulp_after),
            _number(step.cap_delta),
            _number(step.reference_cap_delta),
            _number(step.delta_top_logprob),
            _number(step.max_delta_logprob),
            f"{step.shared_top}/{step.num_top}",
        )
        for step in result.steps
    )
    console.print(_table(columns, rows))
    console.print("* another next token than the reference's")


def _doctor(console: Console, report: DoctorReport) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("part", "state", "what", "mend"):
        table.add_column(name, overflow="fold")
    for one in report.findings:
        style = _STATES[one.state]
        table.add_row(escape(one.name), f"[{style}]{one.state}[/{style}]", escape(one.detail), escape(one.mend))
    console.print(table)


def _any(console: Console, result: object) -> None:
    """Scalars as name and value; each tuple of dataclasses as a table."""
    assert is_dataclass(result), f"{type(result).__name__} is not a result"
    tables = []
    for one in fields(result):
        value = getattr(result, one.name)
        if isinstance(value, tuple) and value and is_dataclass(value[0]):
            tables.append((one.name, value))
        elif value not in ((), "", None, {}):
            console.print(f"{one.name.replace('_', ' ')}: {escape(_cell(value))}")
    for name, rows in tables:
        columns = [one.name for one in fields(rows[0])]
        console.print(f"\n{name.replace('_', ' ')}")
        console.print(_table(columns, ([_cell(getattr(row, column)) for column in columns] for row in rows)))


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, (tuple, list)):
        return ", ".join(_cell(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return "" if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


_SHOW: tuple[tuple[type[Any], Callable[[Console, Any], None]], ...] = (
    (GenerationRun, _generation),
    (SweepRun, _sweep),
    (DecodeComparison, _decode),
    (DoctorReport, _doctor),
)
