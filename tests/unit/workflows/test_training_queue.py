"""A folder of data sets trained one after the other, or by workers: nothing twice, nothing lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab._base import jsonio
from trimtab._base.files import FileLock
from trimtab.errors import InputError, UnfinishedError
from trimtab.report import render_text
from trimtab.results import from_json
from trimtab.results.training import QueueEstimate, QueueRun
from trimtab.testbed import ATTRIBUTES, contrast
from trimtab.vectors.train import Engine, TrainingConfig, _loop, load_trained
from trimtab.workflows.training_queue import train_all

CONFIG = TrainingConfig(sites=("layers.3.resid_post",), epochs=2, learning_rate=0.3, patience=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("testbed")


def write_sets(folder: Path, names: dict[str, str], n: int = 8) -> Path:
    """Write one JSONL file of labelled texts per name."""
    folder.mkdir(parents=True)
    for seed, (name, attribute) in enumerate(names.items()):
        found = contrast(attribute, n, seed)
        rows = [
            {"text": text, "label": label, "question": f"pair {index}", "score": 100 * (label == "pos")}
            for index, pair in enumerate(zip(found.positive, found.negative, strict=True))
            for label, text in zip(("pos", "neg"), pair, strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("".join(jsonio.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sets(tmp_path / "sets", {"a": "animal", "b": ATTRIBUTES[5], "c": ATTRIBUTES[1]})


def vector(place: Path) -> torch.Tensor:
    found: torch.Tensor = load_trained(place).steering.bound[0].op.vector  # type: ignore[attr-defined]
    return found


class _Steps:
    """Counts the steps that were taken, by set; raises after some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        self.taken: list[tuple[str, int]] = []
        self.left = stop_after
        real = _loop.Loop._step

        def step(one: _loop.Loop, done: int) -> Any:
            found = real(one, done)
            if self.left == 0:
                self.left = None
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.taken.append((one._batched.name, done))
            return found

        monkeypatch.setattr(_loop.Loop, "_step", step)


def test_an_interrupted_queue_repeats_nothing_and_loses_nothing(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_all(folder, engine, CONFIG, out=tmp_path / "whole")
    assert isinstance(whole, QueueRun) and whole.finished
    steps = _Steps(monkeypatch, stop_after=3)
    with pytest.raises(UnfinishedError, match="go on with the same command"):
        train_all(folder, engine, CONFIG, out=tmp_path / "cut")
    states = {one.name: one.state for one in _rows(tmp_path / "cut", folder)}
    assert states == {"a": "done", "b": "running", "c": "waiting"}
    run = train_all(folder, engine, CONFIG, out=tmp_path / "cut")
    assert isinstance(run, QueueRun) and run.finished and not run.next_command
    assert len(steps.taken) == len(set(steps.taken)) == sum(row.steps or 0 for row in whole.rows)
    for name in "abc":
        assert torch.equal(vector(tmp_path / "cut" / name), vector(tmp_path / "whole" / name))
    before = list(steps.taken)
    again = train_all(folder, engine, CONFIG, out=tmp_path / "cut")
    assert steps.taken == before
    assert isinstance(again, QueueRun) and again.rows == run.rows
    assert from_json(QueueRun, (tmp_path / "cut" / "summary.json").read_text()) == again


def _rows(place: Path, folder: Path) -> Any:
    from trimtab.workflows import training_queue

    return [training_queue._row(job) for job in training_queue._jobs(folder, place, "")]


def test_a_killed_process_loses_only_what_was_not_written(engine: Engine, folder: Path, tmp_path: Path) -> None:
    code = f"""
import os, torch
torch.set_num_threads(1)
from trimtab.vectors.train import TrainingConfig, _loop
from trimtab.workflows.training_queue import train_all
real, count = _loop.Loop._step, iter(range(100))
def step(one, done):
    if next(count) == 3:
        os._exit(9)
    return real(one, done)
_loop.Loop._step = step
train_all({str(folder)!r}, "testbed", TrainingConfig.of({jsonio.loads(CONFIG.json())!r}), out={str(tmp_path / "out")!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    kept = (tmp_path / "out" / "a" / "training.json").read_bytes()
    run = train_all(folder, engine, CONFIG, out=tmp_path / "out")
    assert isinstance(run, QueueRun) and run.finished
    assert (tmp_path / "out" / "a" / "training.json").read_bytes() == kept
    train_all(folder, engine, CONFIG, out=tmp_path / "whole")
    assert load_trained(tmp_path / "out" / "b").result.resumed == 1
    for name in "abc":
        assert torch.equal(vector(tmp_path / "out" / name), vector(tmp_path / "whole" / name))


def test_two_workers_of_a_ray_cluster_train_what_one_process_trains(engine: Engine, tmp_path: Path) -> None:
    """Every set is trained, once, by one of them: a queue that strides over a strided list loses most sets."""
    names = {f"set{number}": ATTRIBUTES[number % 7] for number in range(8)}
    folder = write_sets(tmp_path / "sets", names, n=5)
    config = TrainingConfig(sites=("layers.4.resid_post",), epochs=2, learning_rate=0.3)
    serial = train_all(folder, engine, config, out=tmp_path / "serial")
    shared = train_all(folder, "testbed", config, out=tmp_path / "shared", ray="local", workers=2)
    assert isinstance(serial, QueueRun) and isinstance(shared, QueueRun)
    assert shared.finished and shared.workers == 2 and len(shared.rows) == 8
    for one, two in zip(serial.rows, shared.rows, strict=True):
        assert (one.name, one.loss, one.best_step, one.norm) == (two.name, two.loss, two.best_step, two.norm)
        assert torch.equal(vector(Path(one.path)), vector(Path(two.path)))
    made_by = {load_trained(row.path).result.provenance["process"] for row in shared.rows}
    assert len(made_by) == 2


def test_a_dry_run_says_what_it_would_cost(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = train_all(folder, engine, CONFIG, out=tmp_path / "out", dry_run=True)
    assert isinstance(found, QueueEstimate) and not (tmp_path / "out").exists()
    assert [one.name for one in found.sets] == ["a", "b", "c"]
    assert found.seconds > 0 and found.memory > 0
    assert found.tokens == sum(one.tokens for one in found.sets) * CONFIG.epochs
    steps = _Steps(monkeypatch)
    run = train_all(folder, engine, CONFIG, out=tmp_path / "out")
    assert isinstance(run, QueueRun) and len(steps.taken) == sum(one.steps for one in found.sets)
    again = train_all(folder, engine, CONFIG, out=tmp_path / "out", dry_run=True)
    assert isinstance(again, QueueEstimate) and again.seconds == 0 and again.tokens == 0


def test_a_bad_set_is_reported_and_the_others_are_trained(engine: Engine, folder: Path, tmp_path: Path) -> None:
    (folder / "b.jsonl").write_text('{"text": "the fox slept .", "label": "neg"}\n')
    cost = train_all(folder, engine, CONFIG, out=tmp_path / "out", dry_run=True)
    assert isinstance(cost, QueueEstimate)
    assert [one.state for one in cost.sets] == ["waiting", "failed", "waiting"]
    assert "no example has the label 'pos'" in cost.sets[1].error
    assert cost.tokens == (cost.sets[0].tokens + cost.sets[2].tokens) * CONFIG.epochs > 0
    with pytest.raises(InputError, match=r"no set of .* can be trained; a: SiteError: "):
        train_all(folder, engine, CONFIG, out=tmp_path / "out", dry_run=True, sites=("layers.99.resid_post",))
    text = render_text(cost)
    assert "; 1 of 3 cannot be trained" in text and "note: b: InputError: " in text
    run = train_all(folder, engine, CONFIG, out=tmp_path / "out")
    assert isinstance(run, QueueRun) and not run.finished
    states = {row.name: row.state for row in run.rows}
    assert states == {"a": "done", "b": "failed", "c": "done"}
    assert "no example has the label 'pos'" in run.rows[1].error and "--retry (1 failed)" in run.next_command
    (folder / "b.jsonl").write_bytes((folder / "c.jsonl").read_bytes())
    assert train_all(folder, engine, CONFIG, out=tmp_path / "out").rows[1].state == "failed"  # type: ignore[union-attr]
    mended = train_all(folder, engine, CONFIG, out=tmp_path / "out", retry=True)
    assert isinstance(mended, QueueRun) and mended.finished


def test_a_set_that_another_process_trains_is_left_to_it(engine: Engine, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "b").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "b" / ".lock"):
        run = train_all(folder, engine, CONFIG, out=tmp_path / "out")
    assert isinstance(run, QueueRun) and not run.finished
    assert {row.name: row.state for row in run.rows} == {"a": "done", "b": "waiting", "c": "done"}


def test_conditions_select_rows_of_every_set(engine: Engine, folder: Path, tmp_path: Path) -> None:
    run = train_all(folder, engine, CONFIG, out=tmp_path / "out", select="score>=75")
    assert isinstance(run, QueueRun) and run.finished


def test_refusals(engine: Engine, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no directory; give one with a data set per file"):
        train_all(tmp_path / "none", engine, CONFIG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no data set"):
        train_all(tmp_path / "empty", engine, CONFIG)
    (folder / "a.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="two data sets named 'a'"):
        train_all(folder, engine, CONFIG)
    (folder / "a.parquet").unlink()
    train_all(folder, engine, CONFIG, out=tmp_path / "out", max_steps=1)
    with pytest.raises(InputError, match="holds a queue with max_steps=1, and None was given"):
        train_all(folder, engine, CONFIG, out=tmp_path / "out")
    with pytest.raises(InputError, match="loads the model on every worker: give it by name"):
        train_all(folder, engine, CONFIG, out=tmp_path / "ray", ray="local")
