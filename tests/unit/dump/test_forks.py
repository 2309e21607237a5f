"""Processes that a dumped one forks: recorded under a rank of their own, or named in the manifest; never mixed in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from trimtab import dump
from trimtab.trace import Trace

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

LAUNCHER = """
import multiprocessing, sys
import torch
from torch import nn

def work(rank, store):
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model(torch.full((2, 3), float(rank + 1))).sum().backward()
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=work, args=(rank, sys.argv[1])) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(max(child.exitcode for child in children))
"""

HELPER = """
import multiprocessing
import torch
from torch import nn

model = nn.Linear(3, 3)

def work(model):
    for _ in range(3):
        model(torch.ones(1, 3))

def fork(model):
    child = multiprocessing.get_context("fork").Process(target=work, args=(model,))
    child.start()
    child.join()

if __name__ == "__main__":
    fork(nn.Sequential(model))  # before anything is recorded
    model(torch.ones(1, 3))
    fork(model)
    fork(nn.ReLU())
    nn.Flatten()(model(torch.ones(1, 3)))
"""


def test_forked_ranks_are_recorded_under_their_rank(tmp_path: Path) -> None:
    """The launcher itself calls no model, as torch.multiprocessing.spawn(start_method="fork") does."""
    script = tmp_path / "launch.py"
    script.write_text(LAUNCHER)
    found = dump.run([sys.executable, str(script), str(tmp_path / "store")], tmp_path / "d", parts="outputs loss")
    assert found.passed and {one.rank for one in found.counts} == {0, 1}, str(found)
    assert not any("forked" in text for text in found.not_hooked)
    trace = Trace.open(tmp_path / "d", incomplete_ok=False)
    outputs = [
        trace.tensor(trace.filter(rank=rank).index.filter(name="module:0.output")["record_id"][0]) for rank in (0, 1)
    ]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    for rank, output in enumerate(outputs):
        assert torch.equal(output, model[0](torch.full((2, 3), float(rank + 1))))


def test_a_forked_helper_is_named_and_records_nothing(tmp_path: Path) -> None:
    """Whether it was forked before anything was recorded or after; one that calls no model is not named."""
    script = tmp_path / "helper.py"
    script.write_text(HELPER)
    found = dump.run([sys.executable, str(script)], tmp_path / "d", parts="outputs")
    assert found.passed, str(found)
    named = [text.partition(": ")[0] for text in found.not_hooked if "forked child" in text]
    assert named == ["(forked child) (Sequential)", "(forked child) (Linear)"]
    index = Trace.open(tmp_path / "d", incomplete_ok=False).index
    assert index.filter(name="output").height == 2  # those of the parent
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [".dump.lock", "manifest.json", "rank-00000"]


def test_a_child_of_a_dump_in_the_program_leaves_its_trace_alone(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    with dump.record(tmp_path / "d", parts="outputs") as session:
        session.watch(model)
        model(torch.ones(1, 3))
        child = os.fork()
        if child == 0:  # as a worker that never comes back to Python's exit
            code = 1
            try:
                model(torch.zeros(5, 3))
                dump.dump("mine", torch.ones(2))
                code = 0 if dump.active() is None else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        model(torch.ones(2, 3))
    trace = Trace.open(tmp_path / "d", incomplete_ok=False)
    assert [tuple(shape) for shape in trace.index["shape"]] == [(1, 3), (2, 3)]
    (entry,) = [one for one in trace.manifest["plan"]["not_hooked"] if one["module"] == "(forked child)"]
    assert entry["class"] == "Linear"
