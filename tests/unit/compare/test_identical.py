"""Records of equal digest are judged as columns: what is said of them is what is said of each alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trimtab.compare import compare, execute, plan_comparison
from trimtab.compare import match as match_module
from trimtab.results import to_dict
from trimtab.results.comparison import Comparison, RecordKey
from trimtab.results.lines import ComparedLine, VerdictLine

Write = Callable[..., Path]
STEPS, RANKS, NAMES = 3, 2, ("a", "b", "c", "d")


def records(changed: tuple[int, ...] = ()) -> list[tuple[str, torch.Tensor, dict[str, object]]]:
    """Names by steps and ranks, two of them without values of their own; the changed ones are off by a quarter."""
    found = []
    for number in range(STEPS * RANKS * len(NAMES)):
        step, rest = divmod(number, RANKS * len(NAMES))
        rank, at = divmod(rest, len(NAMES))
        values = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        fields: dict[str, object] = {"step": step, "rank": rank, "layer": at if at < 2 else None, "phase": "fwd_bwd"}
        found.append((NAMES[at], values * (1.25 if number in changed else 1), fields))
    return found


def bare(result: Comparison) -> dict[str, object]:
    """A result without the sentence of its plan that says how it was read."""
    return to_dict(dataclasses.replace(result, plan=()))


@pytest.mark.parametrize("changed", [(), (0,), (5, 6, 23), tuple(range(24))])
def test_columns_say_what_single_pairs_say(write: Write, changed: tuple[int, ...]) -> None:
    """With verified bytes every pair is judged on its own: nothing but the sentence about reading may change."""
    one, two = write("one", records()), write("two", records(changed))
    lines: list[list[ComparedLine | VerdictLine]] = [[], []]
    options = {"rules": ["d: max_abs < 1"]}
    columns = compare(one, two, on_compared=lines[0].append, **options)  # type: ignore[arg-type]
    single = compare(one, two, verify=True, on_compared=lines[1].append, **options)  # type: ignore[arg-type]
    assert bare(columns) == bare(single) and lines[0] == lines[1]
    assert columns.records.rows == 24 - len(changed) and single.records.rows == 0
    assert columns == dataclasses.replace(single, plan=columns.plan)
    assert [number for number, one in enumerate(columns.records) if one.status != "identical"] == list(changed)
    assert columns.counts["identical"] == 24 - len(changed) and len(columns.failing()) <= len(changed)


def test_processes_find_the_same_and_tell_it_in_the_same_order(write: Write) -> None:
    one, two = write("one", records()), write("two", records((5, 6, 23)))
    lines: list[list[ComparedLine | VerdictLine]] = [[], []]
    alone = compare(one, two, on_compared=lines[0].append)
    assert to_dict(compare(one, two, jobs=2, on_compared=lines[1].append)) == to_dict(alone) and lines[0] == lines[1]


def test_the_ledger_counts_columns_by_step_rank_and_tensor(write: Write) -> None:
    result = compare(write("one", records()), write("two", records()))
    counted = {(one.axis, one.value): one.candidate.compared for one in result.ledger.groups}
    assert counted == {
        **{("step", str(step)): 8 for step in range(STEPS)},
        **{("rank", str(rank)): 12 for rank in range(RANKS)},
        **{("site", name): 6 for name in NAMES},
    }
    assert result.ledger.reference.compared == result.ledger.reference.found == 24


def test_identical_records_are_not_built(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the comparison nor its summary makes a pair or a verdict for each of them."""
    made: list[RecordKey] = []

    def key_of(row: dict[str, object]) -> RecordKey:
        made.append(keep(row))
        return made[-1]

    keep = match_module.key_of
    for module in (match_module, execute):
        monkeypatch.setattr(module, "key_of", key_of)
    result = compare(write("one", records()), write("two", records()))
    assert result.passed and result.counts["identical"] == 24
    assert len(made) <= len(NAMES)
    assert len(list(result.records)) == 24 and len(made) >= 24


def test_a_plan_prints_as_many_pairs_as_are_asked_for(write: Write) -> None:
    plan = plan_comparison(write("one", records()), write("two", records((7,))))
    assert "24 pairs" not in plan.describe(24) and "... and 21 more" in plan.describe(3)
    assert "pairs: 24 (0 by row and position, 24 whole; 23 identical by digest, not read)" in plan.lines()
