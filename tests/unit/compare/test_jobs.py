"""Several processes find what one finds, and tell it in the same order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.compare.sharing import world, write_run
from trimtab.compare import compare
from trimtab.compare import execute as execute_module
from trimtab.compare import parallel as parallel_module
from trimtab.compare.execute import Execution
from trimtab.compare.parallel import judge_in_processes
from trimtab.compare.plan import plan_comparison
from trimtab.errors import ComparisonError, InputError
from trimtab.results import from_json, to_json
from trimtab.results.comparison import Comparison
from trimtab.results.lines import ComparedLine, VerdictLine

Write = Callable[..., Path]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Sixty tensors: identical, close, wrong, misfitting, missing, replicated badly."""
    dims = "s h[tp]"
    whole = [(f"t{number}", normal(8, 16, seed=number), {"dims": dims, "step": number % 3}) for number in range(60)]

    def change(rank: int, name: str, part: torch.Tensor) -> torch.Tensor | None:
        number = int(name[1:])
        if number % 7 == 3:
            return part * 1.3 if rank == 1 else part
        if number % 7 == 4:
            return part * (1 + 2**-22)
        if number == 20:
            return None if rank == 1 else part
        if number == 21:
            return part[:, :3]
        return torch.cat([part, part]) if number == 22 and rank == 0 else part

    one = write_run(tmp_path / "one", whole, [{"tp": 0}])
    return one, write_run(tmp_path / "many", whole, world(tp=2), change=change)


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    one, many = runs(tmp_path)
    lines: list[list[ComparedLine | VerdictLine]] = [[], []]
    found = [
        compare(one, many, rules=["t1: max_abs < 1", "t4: ulp < 1"], keep_rows=True, jobs=jobs, on_compared=told.append)
        for jobs, told in ((1, lines[0]), (2, lines[1]))
    ]
    assert to_json(found[0]) == to_json(found[1])
    assert lines[0] == lines[1]
    assert [line.record for line in lines[0][:-1]] == list(found[0].records)  # type: ignore[union-attr]
    assert isinstance(lines[0][-1], VerdictLine) and lines[0][-1].reason == found[0].reason
    assert found[0].counts["failed"] > 5 and found[0].counts["passed"] > 20 and len(found[0].ledger.entries) >= 3
    assert from_json(Comparison, to_json(found[1])) == found[1]


def test_the_number_of_searches_for_fingerprints_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts know nothing of each other; what is too much is taken away where they come together."""
    one, many = runs(tmp_path)
    plan = plan_comparison(one, many)
    monkeypatch.setattr(execute_module, "_FINGERPRINTS", 3)
    serial = list(Execution(plan).records())
    worker = Execution(plan)
    count = len(plan.to_judge)
    parts = [worker.part(begin, min(begin + 2, count)) for begin in range(0, count, 2)]
    together = Execution(plan)
    assert list(together.records(parts)) == serial
    assert sum(bool(record.fingerprints) for record in serial) <= 3
    first = Execution(plan)
    list(first.records())
    assert together.first.found == first.first.found and together.ledger() == first.ledger()


def test_a_process_that_dies_is_said(dump: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(16, 8)
    plan = plan_comparison(dump("a", {"h": x}), dump("b", {"h": x + 1}))
    monkeypatch.setattr(parallel_module, "open_plan", _die)
    with pytest.raises(ComparisonError, match="a process that compared died"):
        list(judge_in_processes(plan, 2))


def _die(_: object) -> None:
    raise SystemExit(9)


def test_no_process(dump: Write) -> None:
    with pytest.raises(InputError, match="jobs=0"):
        compare(dump("a", {"h": normal(2, 2)}), dump("b", {"h": normal(2, 2)}), jobs=0)
