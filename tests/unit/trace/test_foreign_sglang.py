"""sglang's dumps of three eras and Miles' trees of them, from files made by hand as the dumpers name them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import trimtab
from trimtab.errors import TraceError
from trimtab.trace import Trace, import_dump
from trimtab.trace.foreign._sglang import parse_stem, place


def put(folder: Path, value: Any, *, bare: bool = False, meta: Mapping[str, Any] | None = None, **tags: Any) -> Path:
    """Write one file as the dumper of an era does."""
    path = folder / ("___".join(f"{key}={value}" for key, value in tags.items()) + ".pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value if bare else {"value": value, "meta": {**tags, **(meta or {})}}, path)
    return path


def current(folder: Path, index: int, name: str, value: Any, *, step: int = 0, rank: int = 0, **tags: Any) -> Path:
    meta = tags.pop("meta", None)
    status = {} if name.startswith("grad__") else {"recompute_status": "disabled"}
    tags = {"step": step, "rank": rank, "dump_index": index, "name": name, **status, **tags}
    return put(folder, value, meta=meta, **tags)


def test_the_first_era(tmp_path: Path) -> None:
    for index, layer in enumerate((0, 1), start=1):
        tags = {"forward_pass_id": 1, "rank": 2, "name": "attn_out", "dump_index": index, "layer_id": layer}
        put(tmp_path / "sglang_dump_1750000000.1", torch.full((2,), float(layer)), bare=True, **tags)
    trace = Trace.open(tmp_path)
    row = trace.index.row(1, named=True)
    assert (row["step"], row["rank"], row["name"], row["layer"], row["kind"]) == (1, 2, "attn_out", 1, "value")
    assert trace.tensor(row["record_id"]).tolist() == [1.0, 1.0]
    assert trace.ranks == (2,)


def test_the_intermediate_era(tmp_path: Path) -> None:
    tags = {"curr_step": 3, "rank": 0, "name": "x", "dump_index": 1}
    path = tmp_path / ("___".join(f"{key}={value}" for key, value in tags.items()) + ".pt")
    torch.save({"value": torch.ones(2)}, path)
    assert Trace.open(tmp_path).index.row(0, named=True)["step"] == 3


def test_the_current_era(tmp_path: Path) -> None:
    info = {"tp_rank": 1, "tp_size": 2, "pp_rank": 0, "pp_size": 1, "moe_ep_rank": 3, "moe_ep_size": 4}
    meta = {"dims": "t h[tp]", "sglang_parallel_info": info, "world_size": 8}
    current(tmp_path, 1, "x", torch.ones(2, 4), step=5, rank=1, layer_id=7, meta=meta)
    current(tmp_path, 2, "x", torch.ones(2, 4), step=5, rank=1, layer_id=7, expert="w1", meta=meta)
    trace = Trace.open(tmp_path)
    first, second = trace.index.iter_rows(named=True)
    assert (first["tp_rank"], first["pp_rank"], first["ep_rank"], first["cp_rank"]) == (1, 0, 3, None)
    assert (first["dims"], first["layer"], first["step"], first["rank"]) == ("t h[tp]", 7, 5, 1)
    assert (first["name"], second["name"]) == ("x", "x[expert=w1]")
    assert trace.manifest["plan"]["sizes"] == {"tp": 2, "pp": 1, "ep": 4}
    assert trace.manifest["plan"]["coordinates"] == {"1": {"tp": 1, "pp": 0, "ep": 3}}


def test_dims_that_name_a_group_take_its_rank(tmp_path: Path) -> None:
    info = {"tp_rank": 3, "tp_size": 4, "attn_tp_rank": 1, "attn_tp_size": 2, "attn_dp_rank": 1, "attn_dp_size": 2}
    current(tmp_path, 1, "a", torch.ones(2), meta={"dims": "h[tp]", "sglang_parallel_info": info})
    current(tmp_path, 2, "b", torch.ones(2), meta={"dims": "h[attn_tp] # dp:=attn_dp", "sglang_parallel_info": info})
    assert Trace.open(tmp_path).index["tp_rank"].to_list() == [3, 1]


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("non_intrusive__model.layers.3.mlp.output", None, ("module:model.layers.3.mlp.output", "value", 3)),
        ("non_intrusive__a.inputs.0", 2, ("module:a.input", "value", 2)),
        ("grad__non_intrusive__a.output", None, ("module:a.grad_output", "grad", None)),
        ("grad__non_intrusive__a.inputs.0", None, ("module:a.grad_input", "grad", None)),
    ],
)
def test_module_sites(name: str, layer: int | None, expected: tuple[str, str, int | None]) -> None:
    site, _, kind, found = place(name, layer)
    assert (site, kind, found) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("non_intrusive__a.output.1", (None, "module:a.output.1", "value")),
        ("non_intrusive__a.inputs.hidden_states", (None, "module:a.input.hidden_states", "value")),
        ("non_intrusive__inputs.x", (None, "input.x", "value")),
        ("param__layers.3.w", (None, "layers.3.w", "param")),
        ("grad__param__layers.3.w", (None, "layers.3.w", "grad")),
        ("grad__h", (None, "h", "grad")),
    ],
)
def test_names_without_a_site(name: str, expected: tuple[str | None, str, str]) -> None:
    assert place(name, None)[:3] == expected


def test_a_name_with_the_separators_of_the_file_name(tmp_path: Path) -> None:
    current(tmp_path, 1, "a___b", torch.ones(1))
    current(tmp_path, 2, "dir/x", torch.ones(2))
    current(tmp_path, 3, "c___step=9", torch.ones(3))
    current(tmp_path, 4, "../up", torch.ones(4))
    current(tmp_path, 5, "/root/abs", torch.ones(5))
    trace = Trace.open(tmp_path)
    names = ["a___b", "dir/x", "c___step=9", "../up", "/root/abs"]
    assert trace.index["name"].to_list() == names
    assert [len(trace.tensor(record)) for record in trace.index["record_id"]] == [1, 2, 3, 4, 5]
    assert set(trace.index["step"]) == {0}


def test_without_metadata_the_separator_still_belongs_to_the_name() -> None:
    stem = "forward_pass_id=1___rank=0___name=a___b___dump_index=4___layer_id=2"
    assert parse_stem(stem) == {
        "forward_pass_id": "1",
        "rank": "0",
        "name": "a___b",
        "dump_index": "4",
        "layer_id": "2",
    }


def write_step(folder: Path, events: str, *, start: int = 1, step: int = 0) -> None:
    """Write forward calls (a letter is a layer) and gradients (the same letter in capitals) without their tags."""
    for index, event in enumerate(events, start=start):
        layer = ord(event.lower()) - ord("a")
        if event.islower():
            current(folder, index, "h", torch.full((2,), float(layer)), step=step, layer_id=layer)
        else:
            current(folder, index, "grad__h", torch.full((2,), float(layer)), step=step)


@pytest.mark.parametrize("events", ["abcCBA", "abBAabBA", "ababBABA", "aAbB"])
def test_gradients_get_the_layer_of_their_call(tmp_path: Path, events: str) -> None:
    write_step(tmp_path, events)
    trace = Trace.open(tmp_path)
    gradients = trace.filter(kind="grad").index
    assert gradients.height == len(events) // 2
    for row in gradients.iter_rows(named=True):
        assert trace.tensor(row["record_id"])[0].item() == row["layer"]
    calls = trace.filter(kind="value").index
    keys = ["layer", "call_index"]
    assert sorted(gradients.select(keys).rows()) == sorted(calls.select(keys).rows())


def test_calls_of_a_recomputed_pass_are_not_counted(tmp_path: Path) -> None:
    events = [("h", 0, "original"), ("h", 1, "original"), ("h", 1, "recompute"), ("grad__h", 1, None)]
    for index, (name, layer, status) in enumerate([*events, ("h", 0, "recompute"), ("grad__h", 0, None)], start=1):
        tags = {"layer_id": layer, "recompute_status": status} if status else {}
        tags = {"step": 0, "rank": 0, "dump_index": index, "name": name, **tags}
        put(tmp_path, torch.full((2,), float(layer)), **tags)
    index = Trace.open(tmp_path).index
    assert index.filter(kind="grad")["layer"].to_list() == [1, 0]
    assert index["recompute"].to_list() == [False, False, True, False, True, False]


@pytest.mark.parametrize("events", ["abcCB", "aAA", "AaBb"])
def test_gradients_that_do_not_fit_their_calls_stay_in_their_order(tmp_path: Path, events: str) -> None:
    write_step(tmp_path, events)
    trace = Trace.open(tmp_path)
    gradients = trace.filter(kind="grad").index
    assert set(gradients["layer"]) == {None}
    assert gradients["call_index"].to_list() == list(range(gradients.height))
    said = trace.manifest["plan"]["notes"]
    assert any("have no layer" in note for note in said)


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    values = [3, 2.5, True, "thd", [1, 2, 3], {"a": [torch.ones(2), None]}, None, {1, 2}, ["r0", "r1"], 1 << 70]
    for index, value in enumerate(values, start=1):
        current(tmp_path, index, "rids" if value == ["r0", "r1"] else f"v{index}", value)
    trace = Trace.open(tmp_path)
    found = {row["name"]: row for row in trace.index.iter_rows(named=True)}
    dtypes = {name: row["dtype"] for name, row in found.items()}
    assert dtypes == {
        **{"v1": "int64", "v2": "float64", "v3": "bool", "v4": "uint8", "v5": "int64", "v6.a.0": "float32"},
        **{"v6.a.1": "uint8", "v7": "uint8", "v8": None, "v10": None},
    }
    assert bytes(trace.tensor(found["v4"]["record_id"]).tolist()) == b"thd"
    assert trace.tensor(found["v5"]["record_id"]).tolist() == [1, 2, 3]
    skipped = {one["name"]: one["reason"] for one in trace.manifest["plan"]["skipped"]}
    assert set(skipped) == {"v8", "v10", "rids"}
    assert "set" in skipped["v8"] and "64 bits" in skipped["v10"]
    with pytest.raises(TraceError, match="were not kept"):
        trace.tensor(found["v8"]["record_id"])


@pytest.mark.parametrize(
    "value", [np.int64(-3), np.float32(2.5), np.bool_(True), np.uint8(200), np.complex64(1 + 2j), np.float16(0.1)]
)
def test_a_number_of_numpy(tmp_path: Path, value: Any) -> None:
    current(tmp_path / "new", 1, "x", value)
    put(tmp_path / "old", value, bare=True, forward_pass_id=1, rank=0, name="x", dump_index=1)
    for folder in ("old", "new"):
        trace = Trace.open(tmp_path / folder)
        assert trace.problems == ()
        assert trace.tensor(0).item() == value.item()


def miles(root: Path, *, engines: int = 2, inference: str = "engines", rollouts: tuple[int, ...] = (0,)) -> Path:
    for engine in range(engines):
        folder = root / inference / f"engine_{engine}" / ("sglang_dump_17" if inference == "inference" else ".")
        for rank in range(2):
            current(folder, 1, "input_ids", torch.arange(4), rank=rank)
            current(folder, 2, "h", torch.full((4, 2), float(engine)), rank=rank, layer_id=0)
    for rollout in rollouts:
        for phase, prefix in (("fwd_only", "ref_"), ("fwd_only", ""), ("fwd_bwd", "")):
            folder = root / phase / f"{prefix}rollout_{rollout}"
            current(folder, 1, "h", torch.ones(4, 2), step=0, layer_id=0)
            current(folder, 2, "h", torch.ones(4, 2), step=1, layer_id=0)
    return root


@pytest.mark.parametrize("inference", ["engines", "inference"])
def test_miles(tmp_path: Path, inference: str) -> None:
    trace = Trace.open(miles(tmp_path, inference=inference))
    index = trace.index
    assert trace.manifest["plan"]["layout"] == "miles"
    assert index["phase"].unique(maintain_order=True).to_list() == ["inference", "fwd_only", "fwd_only:ref", "fwd_bwd"]
    assert trace.problems == ()
    assert trace.ranks == (0, 1, 2, 3)
    engines = index.filter(pl.col("phase") == "inference")
    assert engines.filter(name="h").select("rank", "dp_rank").rows() == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [trace.tensor(one)[0, 0].item() for one in engines.filter(name="h")["record_id"]] == [0, 0, 1, 1]
    assert trace.filter(phase="fwd_bwd").index["step"].to_list() == [0, 1]
    assert index["record_id"].is_unique().all()


def test_several_rollouts_are_steps(tmp_path: Path) -> None:
    trace = Trace.open(miles(tmp_path, rollouts=(3, 4)))
    rows = trace.filter(phase="fwd_bwd").index.select("step", "micro_step").rows()
    assert rows == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert trace.filter(phase="inference").index["step"].unique().to_list() == [0]


def test_miles_trees_compare_phase_by_phase(tmp_path: Path) -> None:
    ours, theirs = miles(tmp_path / "a"), miles(tmp_path / "b", inference="inference")
    assert trimtab.compare(ours, theirs).passed
    current(theirs / "fwd_bwd" / "rollout_0", 2, "h", torch.full((4, 2), 2.0), step=1, layer_id=0)
    result = trimtab.compare(ours, theirs)
    assert [record.key.phase for record in result.records if record.status == "failed"] == ["fwd_bwd"]


def test_two_ranks_compare_with_one(tmp_path: Path) -> None:
    """Shards are put together by the dims and ranks that the dump has; views are read as what they show."""
    x = torch.randn(16, 32)
    values = {"h": (x, "t h"), "expanded": (x[:1].expand(4, 32), "t h"), "transposed": (x.t(), "h t")}
    for index, (name, (value, dims)) in enumerate(values.items(), start=1):
        current(tmp_path / "one", index, name, value, meta={"dims": dims})
        for rank in (0, 1):
            info = {"megatron_parallel_info": {"tp_rank": rank, "tp_size": 2}}
            part, dims_of = value, f"{dims} # tp:replicated"
            if name == "h":
                part, dims_of = x.chunk(2, 1)[rank], "t h[tp]"
            current(tmp_path / "two", index, name, part.clone(), rank=rank, meta={"dims": dims_of, **info})
    result = trimtab.compare(tmp_path / "one", tmp_path / "two")
    assert result.passed and len(result.records) == 3, result.reason
    info = {"megatron_parallel_info": {"tp_rank": 1, "tp_size": 2}}
    current(tmp_path / "two", 1, "h", x.chunk(2, 1)[1] * 1.1, rank=1, meta={"dims": "t h[tp]", **info})
    assert "on rank 1" in trimtab.compare(tmp_path / "one", tmp_path / "two").reason


def test_several_dumps_in_one_directory_are_not_guessed_about(tmp_path: Path) -> None:
    for name in ("dump_1", "dump_2"):
        current(tmp_path / name, 1, "x", torch.ones(2))
    with pytest.raises(
        TraceError, match=r"holds 2 dumps \(dump_1, dump_2\).*trimtab trace import .*dump_2 --out INDEX"
    ):
        Trace.open(tmp_path)
    assert Trace.open(tmp_path / "dump_1").index.height == 1


def test_two_dumps_of_one_engine_are_not_mixed(tmp_path: Path) -> None:
    for name in ("dump_1", "dump_2"):
        current(tmp_path / "engines" / "engine_0" / name, 1, "x", torch.ones(2))
    with pytest.raises(TraceError, match="holds 2 dumps"):
        Trace.open(tmp_path)


def test_one_dump_below_is_found(tmp_path: Path) -> None:
    current(tmp_path / "dump_20260101", 1, "x", torch.ones(2))
    (tmp_path / "dump_20260101" / "comparator_report.jsonl").write_text("{}")
    torch.save(torch.ones(1), tmp_path / "checkpoint.pt")
    trace = Trace.open(tmp_path)
    assert trace.index["name"].to_list() == ["x"]
    assert trace.manifest["plan"]["ignored"] == ["checkpoint.pt"]


def test_holes_and_doubles_in_the_running_number(tmp_path: Path) -> None:
    for index in (1, 2, 5):
        current(tmp_path, index, f"x{index}", torch.ones(2))
    assert "2 dumps have no file, first dump_index 3" in Trace.open(tmp_path).problems[0]
    current(tmp_path, 3, "x3", torch.ones(2))
    current(tmp_path, 4, "x4", torch.ones(2))
    assert Trace.open(tmp_path).problems == ()
    current(tmp_path, 4, "y", torch.ones(2))
    assert "1 dump_index stand in several files, first 4" in Trace.open(tmp_path).problems[0]


def test_the_forward_hook_dump(tmp_path: Path) -> None:
    for tp in (0, 1):
        folder = tmp_path / f"TP{tp}_PP0_Rank{tp}_pid12{tp}"
        folder.mkdir()
        for number in (0, 1):
            torch.save({"model.layers.0.mlp": torch.full((2,), float(number))}, folder / f"Pass{number:05d}.pt")
    trace = Trace.open(tmp_path)
    assert trace.index.select("step", "rank", "tp_rank", "name").rows() == [
        (step, rank, rank, "model.layers.0.mlp") for rank in (0, 1) for step in (0, 1)
    ]


def test_import_keeps_the_index_and_copies_nothing(tmp_path: Path) -> None:
    source, out = miles(tmp_path / "dump"), tmp_path / "index"
    current(source / "fwd_bwd" / "rollout_0", 4, "x", torch.ones(2))
    (source / "fwd_bwd" / "rollout_0" / "step=0___rank=0___dump_index=5___name=bad.pt").write_bytes(b"PK\3\4nothing")
    result = import_dump(source, out)
    assert (result.layout, result.ranks) == ("miles", (0, 1, 2, 3))
    assert [file.rpartition("/")[2] for file, _ in result.unreadable] == [
        "step=0___rank=0___dump_index=5___name=bad.pt"
    ]
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 200_000
    direct, imported = Trace.open(source), Trace.open(out)
    assert direct.index.equals(imported.index)
    assert imported.problems == direct.problems != ()
    assert imported.manifest["plan"] == direct.manifest["plan"]
    good = [row["record_id"] for row in imported.index.iter_rows(named=True) if row["name"] != "bad"]
    assert all(torch.equal(direct.tensor(one), imported.tensor(one)) for one in good)
    assert trimtab.compare(source, out, waive=["incomplete"]).reason.startswith("1 of")


def test_an_imported_dump_whose_files_changed(tmp_path: Path) -> None:
    path = current(tmp_path / "dump", 1, "x", torch.ones(2))
    import_dump(tmp_path / "dump", tmp_path / "index")
    current(tmp_path / "dump", 1, "x", torch.ones(3))
    with pytest.raises(TraceError, match="the file has changed; import it again"):
        Trace.open(tmp_path / "index").tensor(0)
    path.unlink()
    with pytest.raises(TraceError, match="No such file"):
        Trace.open(tmp_path / "index").tensor(0)


def test_phase_may_be_given(tmp_path: Path) -> None:
    current(tmp_path / "dump", 1, "x", torch.ones(2))
    import_dump(tmp_path / "dump", tmp_path / "index", phase="fwd_bwd")
    assert Trace.open(tmp_path / "index").index["phase"].to_list() == ["fwd_bwd"]
