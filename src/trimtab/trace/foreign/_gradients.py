"""Gradients of activations get back the tags that sglang's dumper loses: those of their forward call.

The hook that writes a gradient keeps only what the caller gave to `dump`; the layer, which comes from the context, is
gone. Backward runs the calls of a tensor in reverse, so within a step the gradients of one name are laid on a stack of
its forward calls, in the order in which both were written. Where the numbers of calls and gradients differ, or several
forward passes were run before any backward in a schedule that is not last in, first out, nothing in the files says
which belongs to which: then (numbers) the gradients stay without a layer, in their own order, and a note says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from trimtab.trace.foreign._row import Row


def give_tags(rows: Iterable[Row]) -> list[str]:
    """Give gradients the layer, tags and call of their forward call; return what is to be said about it.

    Args:
        rows: all rows, in the order of writing.
    """
    calls: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    lost: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if not row.file.stem or row.tags.dump_index is None or row.tags.name.startswith(("param__", "grad__param__")):
            continue
        raw = row.tags.name.removeprefix("grad__")
        key = (row.phase, row.file.rollout, row.rank, row.tags.step, raw, row.inner)
        if row.kind == "grad":
            if row.tags.layer is None:
                lost[key].append(row)
        elif not row.tags.recompute:
            calls[key].append(row)
    notes, matched = [], 0
    for key, gradients in lost.items():
        by_tags: dict[tuple[tuple[str, str], ...], list[Row]] = defaultdict(list)
        for row in gradients:
            by_tags[tuple(sorted(row.tags.extra.items()))].append(row)
        for given, group in by_tags.items():
            forward = [call for call in calls[key] if set(given) <= set(call.tags.extra.items())]
            if _stack(forward, group):
                matched += len(group)
            else:
                notes.append(
                    f"step {key[3]} rank {key[2]}: {len(group)} gradients of {key[4]!r} for {len(forward)} forward "
                    "calls that do not pair up; they have no layer, and call_index is the order of backward"
                )
    if matched:
        notes.append(
            f"{matched} gradients got layer and call from their forward calls, last in, first out: sglang's dumper "
            "does not write them"
        )
    return notes


def _stack(forward: list[Row], gradients: list[Row]) -> bool:
    """Match gradients with calls, last in, first out; False, and nothing done, where that does not come out even."""
    if len(forward) != len(gradients):
        return False
    events = sorted([*forward, *gradients], key=lambda row: row.tags.dump_index or 0)
    waiting: list[Row] = []
    pairs: list[tuple[Row, Row]] = []
    for row in events:
        if row.kind != "grad":
            waiting.append(row)
        elif not waiting:
            return False
        else:
            pairs.append((row, waiting.pop()))
    for gradient, call in pairs:
        gradient.forward, gradient.layer = call, call.layer
    return True
