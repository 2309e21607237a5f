"""Dumps of several processes: real gloo groups, DDP, FSDP2 and tensor parallelism."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import nn

from trimtab import dump
from trimtab.compare import compare
from trimtab.trace import Trace

from .conftest import Net

WORKER = Path(__file__).with_name("worker.py")


def launch(name: str, size: int, out: Path) -> Path:
    running = []
    for rank in range(size):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(WORKER), name, str(out), str(out / "rendezvous")]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(said)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch("two", 2, tmp_path_factory.mktemp("two"))


def rows(trace: Trace, **columns: Any) -> list[dict[str, Any]]:
    return trace.filter(**columns).index.sort("rank").to_dicts()


def whole(trace: Trace, name: str, dim: int, **columns: Any) -> torch.Tensor:
    return torch.cat([trace.tensor(row["record_id"]) for row in rows(trace, name=name, **columns)], dim)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp"])
def test_each_process_writes_its_own_container_under_the_bare_names(two: Path, name: str) -> None:
    trace = Trace.open(two / name, incomplete_ok=False)
    assert trace.ranks == (0, 1) and trace.manifest["plan"]["ranks"] == [0, 1]
    ours, theirs = (trace.filter(rank=rank).index for rank in (0, 1))
    key = ["name", "kind", "step", "micro_step", "call_index", "dims"]
    assert ours.select(key).equals(theirs.select(key))
    assert {"module:0.up.output", "module:1.grad_output", "0.up.weight", "0.up.weight.exp_avg", "loss"} <= set(
        ours["name"]
    )
    axis = "tp" if name == "tp" else "dp"
    assert ours[f"{axis}_rank"].unique().to_list() == [0] and theirs[f"{axis}_rank"].unique().to_list() == [1]
    assert trace.manifest["plan"]["coordinates"] == {"0": {axis: 0}, "1": {axis: 1}}
    counts = trace.manifest["plan"]["counts"]["fwd_bwd"]
    assert counts["0"] == counts["1"] and sum(counts["0"].values()) == ours.height


def test_ddp_gradients_are_the_same_everywhere_and_say_so(two: Path) -> None:
    trace = Trace.open(two / "ddp")
    found = rows(trace, name="1.down.weight", kind="grad", step=1)
    assert {row["dims"] for row in found} == {"d0 d1 # dp:replicated"}
    assert found[0]["digest"] == found[1]["digest"]
    outputs = rows(trace, name="module:1.output", step=1)
    assert outputs[0]["digest"] != outputs[1]["digest"] and outputs[0]["module_class"] == "Mlp"


def test_fsdp_shards_put_together_are_the_tensors_of_ddp(two: Path) -> None:
    sharded, replicated = Trace.open(two / "fsdp"), Trace.open(two / "ddp")
    for kind, suffix in (("param", ""), ("grad", ""), ("optim", ".exp_avg")):
        name = f"0.up.weight{suffix}"
        (first, _) = rows(replicated, name=name, kind=kind, step=1)
        assert {row["dims"] for row in rows(sharded, name=name, kind=kind, step=1)} == {"d0[dp] d1"}
        expected = replicated.tensor(first["record_id"])
        assert torch.allclose(whole(sharded, name, 0, kind=kind, step=1), expected, rtol=1e-5, atol=1e-7)
    classes = sharded.index.filter(pl.col("module_path") == "0.up")["module_class"].unique().to_list()
    assert classes == ["Linear"]
    assert set(sharded.index.filter(pl.col("module_path") == "0")["module_class"]) == {"Mlp"}  # not FSDPMlp


def test_tensor_parallel_shards_have_their_dims(two: Path) -> None:
    trace = Trace.open(two / "tp")
    dims = {row["name"]: row["dims"] for row in rows(trace, kind="param", step=0)}
    assert dims["0.up.weight"] == "d0[tp] d1" and dims["0.down.weight"] == "d0 d1[tp]"
    assert dims["0.down.bias"] == "d0 # tp:replicated"
    torch.manual_seed(0)
    first = nn.Linear(4, 8)
    assert torch.equal(whole(trace, "0.up.weight", 0, kind="param", step=0), first.weight)


def test_a_process_that_records_waits_for_no_other(two: Path) -> None:
    trace = Trace.open(two / "alone", incomplete_ok=False)
    assert trace.ranks == (0,)
    assert trace.manifest["plan"]["ranks"] == [0, 1]  # so that the missing one is missed
    assert trace.manifest["plan"]["coordinates"] == {"0": {"dp": 0, "sp": 1}}


@pytest.mark.parametrize("size", [4])
def test_two_axes_on_four_processes(size: int, tmp_path: Path) -> None:
    trace = Trace.open(launch("four", size, tmp_path) / "both", incomplete_ok=False)
    found = rows(trace, name="1.up.weight", kind="param", step=0)
    assert [(row["dp_rank"], row["tp_rank"]) for row in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {row["dims"] for row in found} == {"d0[tp,dp] d1"}
    torch.manual_seed(0)
    models = [nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)]
    parts = [trace.tensor(row["record_id"]) for row in found]  # tensor parallelism cuts first, FSDP each of its parts
    assert torch.equal(torch.cat([parts[0], parts[2], parts[1], parts[3]]), models[2].weight)

    found = rows(trace := Trace.open(tmp_path / "hsdp"), name="1.up.weight", kind="param", step=0)
    assert {row["dims"] for row in found} == {"d0[dp] d1"} and [row["dp_rank"] for row in found] == [0, 1, 0, 1]
    assert trace.manifest["plan"]["coordinates"] == {str(rank): {"dp": rank} for rank in range(4)}
    result = compare(tmp_path / "one", trace.path, waive=["missing:rank *"])  # recorded by one of the four processes
    assert result.passed, result.reason


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"sp": 1}, {"tp_rank": 1}),
        ({"sp": 1, "tp": 0, "dp": 2}, {"tp_rank": 0, "dp_rank": 2}),
        ({"sp": 3, "pp": 0}, {"tp_rank": 3, "pp_rank": 0}),
    ],
)
def test_sequence_parallel_ranks_are_those_of_tensor_parallelism(
    given: dict[str, int], expected: dict[str, int], tmp_path: Path
) -> None:
    with dump.record(tmp_path / "d", coordinates=given) as session:
        session.dump("x", torch.ones(2), dims="s[sp]")
    (row,) = rows(Trace.open(tmp_path / "d"), name="x")
    axes = ("tp", "pp", "cp", "ep", "dp")
    assert {f"{axis}_rank": row[f"{axis}_rank"] for axis in axes if row[f"{axis}_rank"] is not None} == expected


def not_hooked(path: Path) -> list[tuple[str, str, str]]:
    entries = Trace.open(path).manifest["plan"]["not_hooked"]
    return [(entry["module"], entry["class"], entry["reason"]) for entry in entries]


def test_modules_without_hooks_of_wrapped_models_are_listed(two: Path) -> None:
    wrapper = "wrapper (DistributedDataParallel); what it wraps is recorded under this name"
    assert not_hooked(two / "ddp") == [("", "DistributedDataParallel", wrapper)]
    assert not_hooked(two / "fsdp") == []
    assert not_hooked(two / "tp") == []


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["around", "in place", "block"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_modules_without_hooks_of_compiled_models_are_listed(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = Net(layers=1)
    expected = model(torch.ones(2, 3))
    inside = ["embed", "blocks", "blocks.0", "blocks.0.up", "blocks.0.down", "head"]
    reason = "runs inside code compiled by torch.compile (the model)"
    if how == "around":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.blocks[0].compile(backend="eager")
        inside, reason = ["blocks.0.up", "blocks.0.down"], reason.replace("the model", "blocks.0")
    with dump.record(tmp_path / "d") as session:
        session.watch(model)
        result = model(torch.ones(2, 3))
        result["logits"].mean().backward()
        model(torch.ones(2, 3))
    listed = not_hooked(tmp_path / "d")
    if how == "block":
        assert listed.pop(0) == ("blocks", "ModuleList", "container (ModuleList), which is not called")
    assert [entry[0] for entry in listed] == inside and {entry[2] for entry in listed} == {reason}
    assert torch.equal(result["logits"], expected["logits"])
    trace = Trace.open(tmp_path / "d")
    assert {row["module_class"] for row in rows(trace, name="output.logits")} == {"Net"}
    assert [row["kind"] for row in trace.filter(name="output.logits").index.to_dicts()] == ["value", "grad", "value"]
    assert [row["micro_step"] for row in rows(trace, name="x")] == [0, 1]
    assert {row["name"] for row in rows(trace, kind="param")} == {name for name, _ in Net(layers=1).named_parameters()}
    if how == "block":
        assert rows(trace, site="module:blocks.0.output") and rows(trace, site="module:embed.grad_output")


@pytest.mark.usefixtures("fresh_compiler")
def test_hooks_set_before_compiling_stay_out_of_the_compiled_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(layers=1)
    expected = model(torch.ones(2, 3))["logits"]
    with dump.record(tmp_path / "d") as session:
        session.watch(model)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 3))["logits"], expected)
    never = {entry[0] for entry in not_hooked(tmp_path / "d") if "never called" in entry[2]}
    assert {"", "embed", "blocks.0.up", "head"} <= never
