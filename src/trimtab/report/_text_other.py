"""Text of the results that have no page: generations, sweeps, step tables, listings, the state of an installation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trimtab.report import _format as fmt
from trimtab.report._console import MAX_LINES, TextPage
from trimtab.results import DecodeComparison, GenerationRun

_HIDDEN = ("format_version", "kind", "passed", "reason")


def render(result: Any, *, width: int, color: bool) -> str:
    """Return the text of any result dataclass; the ones below have a form of their own."""
    page = TextPage(width, color)
    if isinstance(result, GenerationRun):
        _generation(result, page)
    elif isinstance(result, DecodeComparison):
        _decode(result, page)
    else:
        _fields(result, page)
    return page.text()


def _generation(run: GenerationRun, page: TextPage) -> None:
    for one in run.texts:
        page.line(one.prompt, "bold")
        page.item(one.text, f"{fmt.count(len(one.token_ids), 'token')}, stopped by {one.stop}", "")
        for dose in one.doses:
            clamped = "" if dose.clamped is None else f", {dose.clamped} clamped"
            touched = f"{dose.rows} rows{clamped}" if dose.rows else f"no row: {dose.reason}"
            page.item(f"    {dose.site} {dose.op}: {touched}", "", "")
        page.line("")
    page.facts(
        {"model": f"{run.model}, {run.backend}, {run.dtype}", "steering": run.steering, "trace": run.trace or ""}
    )


def _decode(result: DecodeComparison, page: TextPage) -> None:
    page.line(f"{'Same tokens' if result.passed else 'Different tokens'}: {result.reason}", "bold")
    page.facts(
        {
            "prompt": result.prompt,
            "model": result.model,
            "steering": result.steering if result.site in result.steering else f"{result.steering} at {result.site}",
            result.reference_label: result.reference_text,
            result.label: result.text,
            "equal": fmt.percent(result.match_ratio),
            "first differs": "never" if result.first_divergence is None else f"token {result.first_divergence}",
        }
    )
    page.table(
        f"{result.label} against {result.reference_label}, fed the same tokens; rmse before and after the op",
        (">step", ">pos", "reference", "token", ">margin", ">before", ">after", ">rel_l2", ">ULP",
         ">moved", ">ref", "clamped", ">d logp", ">shared"),
        ((str(step.step), str(step.position), fmt.one_line(repr(step.reference_token), 16),
          "same" if step.same_token else fmt.one_line(repr(step.token), 16), fmt.number(step.reference_margin),
          fmt.number(step.rmse_before), fmt.number(step.rmse_after), fmt.number(step.rel_l2_after),
          fmt.number(step.max_ulp_after), fmt.number(step.cap_delta), fmt.number(step.reference_cap_delta),
          _both(step.reference_clamped, step.clamped), fmt.number(step.max_delta_logprob),
          f"{step.shared_top}/{step.num_top}") for step in result.steps),
        styles=["" if step.same_token else "red" for step in result.steps],
    )  # fmt: skip


def _both(reference: bool, candidate: bool) -> str:
    return ("yes" if candidate else "no") if reference == candidate else "reference only" if reference else "only here"


def _fields(result: Any, page: TextPage) -> None:
    """Scalars as a list of facts, dataclasses as tables, texts as lines; nothing but a version is left out."""
    if hasattr(result, "passed"):
        reason = getattr(result, "reason", "")
        page.line(f"{'Passed' if result.passed else 'Not passed'}{': ' * bool(reason)}{reason}", "bold")
    facts: dict[str, str] = {}
    later: list[tuple[str, Any]] = []
    for one in dataclasses.fields(result):
        value = getattr(result, one.name)
        label = one.name.replace("_", " ")
        if one.name in _HIDDEN:
            continue
        if isinstance(value, Mapping):
            facts |= {str(key): _cell(item) for key, item in value.items()}
        elif isinstance(value, tuple) and not all(isinstance(item, int | float) for item in value):
            later.append((label, value))
        else:
            facts[label] = _cell(value)
    page.facts(facts)
    for label, value in later:
        if dataclasses.is_dataclass(value[0]):
            _table(label, value, page)
        else:
            page.line("")
            page.line(label, "bold")
            page.lines(f"  {_cell(item)}" for item in value)


def _table(label: str, rows: tuple[Any, ...], page: TextPage) -> None:
    names = [one.name for one in dataclasses.fields(rows[0])]
    used = [name for name in names if any(getattr(row, name) not in (None, "", ()) for row in rows)]
    numeric = [all(isinstance(getattr(row, name), int | float | None) for row in rows) for name in used]
    heads = [">" * number + name.replace("_", " ") for name, number in zip(used, numeric, strict=True)]
    page.table(
        label,
        heads,
        ([_cell(getattr(row, name)) for name in used] for row in rows[:MAX_LINES]),
        left_out=len(rows) - MAX_LINES,
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float | None):
        return fmt.number(value)
    if isinstance(value, tuple | list):
        return ", ".join(map(_cell, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{one.name} {_cell(getattr(value, one.name))}" for one in dataclasses.fields(value))
    return str(value)
