"""Levels, step ranges, the ring of the last steps, budgets, and the second pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from trimtab import dump
from trimtab.dump.config import StepRange
from trimtab.errors import InputError, TraceExistsError
from trimtab.trace import Trace

from .conftest import Net, train

Make = Callable[..., Net]
Read = Callable[..., list[dict[str, Any]]]


def run(path: Path, model: Net, steps: int = 2, **options: Any) -> Trace:
    with dump.record(path, **options) as session:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.watch(model, optimizer)
        train(model, optimizer, steps, session=session)
    return Trace.open(path)


def test_levels_keep_less_and_agree(tmp_path: Path, net: Make) -> None:
    traces = {level: run(tmp_path / level, net(), level=level) for level in ("values", "statistics", "digests")}
    values = traces["values"].index
    for level in ("statistics", "digests"):
        assert traces[level].index["digest"].to_list() == values["digest"].to_list()
        assert traces[level].index["shard"].null_count() == values.height
    assert traces["statistics"].index["std"].to_list() == values["std"].to_list()
    assert traces["digests"].index["std"].null_count() == values.height


@pytest.mark.parametrize(
    ("text", "chosen"),
    [("", [0, 1, 2, 3, 4, 5, 6]), ("3", [3]), ("2:5", [2, 3, 4]), ("1::2", [1, 3, 5]), (":4:3,5", [0, 3, 5])],
)
def test_step_texts(text: str, chosen: list[int]) -> None:
    steps = StepRange.parse(text)
    assert [step for step in range(7) if step in steps] == chosen


@pytest.mark.parametrize("steps", ["1:6:2", range(1, 6, 2), [1, 3, 5]])
def test_only_the_asked_steps_are_recorded(steps: Any, tmp_path: Path, net: Make) -> None:
    trace = run_steps(tmp_path / "d", net(), steps)
    assert trace.index["step"].unique().sort().to_list() == [1, 3, 5]
    assert trace.filter(step=3, name="head.weight.momentum_buffer").index.is_empty()
    assert len(trace.filter(step=3, name="head.weight", kind="grad").index) == 1


def run_steps(path: Path, model: Net, steps: Any) -> Trace:
    with dump.record(path, steps=steps) as session:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.watch(model, optimizer)
        train(model, optimizer, 7, session=session)
    return Trace.open(path)


def test_the_ring_is_written_when_a_nan_appears(tmp_path: Path, net: Make) -> None:
    model = net()
    with dump.record(tmp_path / "d", ring=2) as session:
        session.watch(model)
        for step in range(7):
            x = torch.full((1, 3), float("nan") if step == 4 else 1.0)
            model.zero_grad()
            model(x)["logits"].mean().backward()
            session.step()
    trace = Trace.open(tmp_path / "d", incomplete_ok=False)
    assert trace.index["step"].unique().sort().to_list() == [3, 4]
    assert trace.filter(step=4, name="x").index["nan_count"].to_list() == [3]


def test_the_ring_is_written_when_an_exception_ends_the_run(tmp_path: Path, net: Make) -> None:
    model = net()
    with pytest.raises(ValueError, match="end"), dump.record(tmp_path / "d", ring=2) as session:
        session.watch(model)
        for step in range(4):
            model(torch.ones(1, 3))
            if step == 3:
                raise ValueError("end")
            session.step()
    trace = Trace.open(tmp_path / "d")
    assert trace.index["step"].unique().sort().to_list() == [2, 3]
    assert any("ValueError: end" in problem for problem in trace.problems)


def test_a_ring_without_a_nan_writes_nothing(tmp_path: Path, net: Make) -> None:
    assert run(tmp_path / "d", net(), ring=2).index.is_empty()


def test_the_ring_stays_within_its_bytes(tmp_path: Path, net: Make) -> None:
    model = net()
    full = run(tmp_path / "full", net(), 1, parts="outputs")
    one_step = int((full.index["shape"].list.eval(pl.element().product()).list.first() * 4).sum())
    with (
        pytest.raises(ValueError, match="end"),
        dump.record(tmp_path / "d", ring=50, max_bytes=3 * one_step, parts="outputs") as session,
    ):
        session.watch(model)
        train(model, torch.optim.SGD(model.parameters()), 9, session=session)
        raise ValueError("end")
    steps = Trace.open(tmp_path / "d").index["step"].unique().sort().to_list()
    assert steps == [6, 7, 8]


def test_recording_stops_within_the_byte_budget_and_says_so(tmp_path: Path, net: Make) -> None:
    model = net()
    with dump.record(tmp_path / "d", max_bytes=2000, parts="outputs") as session:
        session.watch(model)
        for _ in range(9):
            model(torch.ones(5, 3))
            session.step()
        assert "max_bytes=2000" in session.stopped
    trace = Trace.open(tmp_path / "d")
    stored = sum(trace.tensor(number).nbytes for number in trace.index["record_id"])
    assert 1500 < stored <= 2000
    assert "max_bytes=2000" in trace.manifest["plan"]["stopped"]["0"]
    assert any("max_bytes=2000" in problem for problem in trace.problems)


def test_recording_stops_within_the_time_budget_and_says_so(tmp_path: Path, net: Make) -> None:
    trace = run(tmp_path / "d", net(), max_seconds=0.0)
    assert trace.index.height == 1 and "max_seconds=0" in trace.problems[0]


def test_two_passes_fetch_only_what_diverged(tmp_path: Path, net: Make) -> None:
    import trimtab

    def one_pass(name: str, broken: bool, **options: Any) -> Trace:
        model = net()
        if broken:
            with torch.no_grad():
                model.blocks[1].down.bias[0] += 1
        return run(tmp_path / name, model, 1, parts="inputs outputs gradients", **options)

    digests = [one_pass(name, name == "b", level="digests") for name in ("a", "b")]
    found = trimtab.compare(*digests)
    assert not found.passed
    fetched = one_pass("c", True, only=found)
    names = set(fetched.index["name"])
    assert {"module:blocks.1.down.output", "output.logits", "module:head.input"} <= names
    assert not names & {"x", "module:blocks.0.output", "module:blocks.1.up.input", "module:blocks.1.down.input"}
    assert fetched.tensor(int(fetched.index["record_id"][0])) is not None
    assert fetched.manifest["plan"]["only"] == len(dump.diverged(found))


def test_what_passed_without_being_identical_is_fetched_too(tmp_path: Path, net: Make) -> None:
    import trimtab

    traces = []
    for name in ("a", "b"):
        model = net()
        with torch.no_grad():
            model.head.bias[0] += 1e-8 if name == "b" else 0
        traces.append(run(tmp_path / name, model, 1, parts="outputs"))
    found = trimtab.compare(*traces)
    assert {record.status for record in found.records} == {"identical", "passed"}
    assert any(text.startswith("module:head.output") for text in dump.diverged(found))
    assert not any("blocks.0" in text for text in dump.diverged(found))


def test_a_second_pass_over_equal_runs_is_refused(tmp_path: Path, net: Make) -> None:
    import trimtab

    traces = [run(tmp_path / name, net(), 1, level="digests", parts="outputs") for name in ("a", "b")]
    with pytest.raises(InputError, match="no record differs"):
        dump.record(tmp_path / "c", only=trimtab.compare(*traces))


def test_expected_names_are_held_against_every_phase(tmp_path: Path, net: Make) -> None:
    import trimtab

    traces = []
    for name in ("a", "b"):
        model = net()
        with dump.record(tmp_path / name, expect="x,positions", parts="inputs") as session:
            session.watch(model)
            model(torch.ones(1, 3))
        traces.append(Trace.open(tmp_path / name))
    assert traces[0].manifest["plan"]["phases"] == {"fwd_bwd": ["x", "positions"]}
    found = trimtab.compare(*traces)
    assert not found.passed and any("positions" in entry.name for entry in found.ledger.entries)


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("sglang", ["input_ids", "positions"]),
        ("megatron", ["input_ids", "cu_seqlens_q", "cu_seqlens_kv", "qkv_format"]),
    ],
)
def test_the_fields_that_a_framework_must_dump(tmp_path: Path, net: Make, preset: str, fields: list[str]) -> None:
    import trimtab

    for name in ("a", "b"):
        model = net()
        with dump.record(tmp_path / name, expect=preset, parts="inputs") as session:
            session.watch(model)
            model(torch.ones(1, 3))
            dump.dump("input_ids", torch.arange(3))
    assert Trace.open(tmp_path / "a").manifest["plan"]["phases"] == {"fwd_bwd": fields}
    found = trimtab.compare(tmp_path / "a", tmp_path / "b")
    missing = {entry.name.split()[0] for entry in found.ledger.entries if entry.kind == "missing"}
    assert not found.passed and missing == set(fields) - {"input_ids"}


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path, net: Make) -> None:
    run(tmp_path / "d", net(), 1)
    with pytest.raises(TraceExistsError):
        run(tmp_path / "d", net(), 1)
