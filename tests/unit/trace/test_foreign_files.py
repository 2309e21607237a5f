"""Plain trees of .pt, .npy and .safetensors files, with and without a pattern; and the way back out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import trimtab
from trimtab.cli import main
from trimtab.errors import InputError, TraceError, TraceExistsError
from trimtab.trace import Trace, TraceWriter, export_dump, import_dump, ls, repair, show, verify
from trimtab.trace.foreign import ForeignValues


def save(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, value.numpy() if isinstance(value, torch.Tensor) else value)
    elif path.suffix == ".safetensors":
        save_file(value, path)
    else:
        torch.save(value, path)
    return path


def test_a_tree_without_a_pattern(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    save(tmp_path / "step_2" / "rank1" / "h.npy", x)
    save(tmp_path / "step_2" / "rank1" / "block" / "mlp.pt", x.bfloat16())
    save(tmp_path / "step_10" / "layer=3" / "w.safetensors", {"a": x, "b": x * 2})
    trace = Trace.open(tmp_path)
    rows = {row["name"]: row for row in trace.index.iter_rows(named=True)}
    assert set(rows) == {"h", "block/mlp", "w.a", "w.b"}
    assert (rows["h"]["step"], rows["h"]["rank"], rows["h"]["layer"]) == (2, 1, None)
    assert (rows["w.b"]["step"], rows["w.b"]["rank"], rows["w.b"]["layer"]) == (10, 0, 3)
    assert torch.equal(trace.tensor(rows["h"]["record_id"]), x)
    assert torch.equal(trace.tensor(rows["block/mlp"]["record_id"]), x.bfloat16())
    assert torch.equal(trace.tensor(rows["w.b"]["record_id"]), x * 2)
    assert trimtab.compare(tmp_path, tmp_path).passed


def test_a_pattern(tmp_path: Path) -> None:
    for step in (7, 8):
        for rank in (0, 1):
            save(tmp_path / "dump" / f"it{step:04d}_r{rank}" / "l5-attn.out.npy", torch.full((2,), float(step)))
    save(tmp_path / "dump" / "notes.npy", torch.ones(1))
    result = import_dump(tmp_path / "dump", tmp_path / "index", pattern="it{step}_r{rank}/l{layer}-{name}")
    assert result.ignored == ("notes.npy",)
    trace = Trace.open(tmp_path / "index")
    assert trace.index.select("rank", "step", "layer", "name").rows() == [
        (rank, step, 5, "attn.out") for rank in (0, 1) for step in (7, 8)
    ]
    assert trace.tensor(trace.filter(step=8, rank=1).index["record_id"][0]).tolist() == [8.0, 8.0]


def test_a_pattern_without_a_name_takes_the_names_in_the_file(tmp_path: Path) -> None:
    save(tmp_path / "dump" / "model-1-of-2.safetensors", {"a.w": torch.ones(2)})
    save(tmp_path / "dump" / "model-2-of-2.safetensors", {"b.w": torch.ones(2)})
    import_dump(tmp_path / "dump", tmp_path / "index", pattern="model-*")
    assert sorted(Trace.open(tmp_path / "index").index["name"]) == ["a.w", "b.w"]


def test_phases_and_coordinates_in_a_pattern(tmp_path: Path) -> None:
    save(tmp_path / "dump" / "fwd_bwd" / "tp1" / "x.npy", torch.ones(2))
    import_dump(tmp_path / "dump", tmp_path / "index", pattern="{phase}/tp{tp_rank}/{name}.npy")
    row = Trace.open(tmp_path / "index").index.row(0, named=True)
    assert (row["phase"], row["tp_rank"], row["name"]) == ("fwd_bwd", 1, "x")


@pytest.mark.parametrize("pattern", ["{stop}/{name}", "{name}{name}", "{", "a}b", "{}"])
def test_a_pattern_that_cannot_be_used(tmp_path: Path, pattern: str) -> None:
    save(tmp_path / "x.npy", torch.ones(2))
    with pytest.raises(InputError, match=r"pattern .* there are \{name\}, \{phase\}, \{step\}"):
        import_dump(tmp_path, tmp_path / "index", pattern=pattern)


def test_a_pattern_that_fits_nothing(tmp_path: Path) -> None:
    save(tmp_path / "x.npy", torch.ones(2))
    with pytest.raises(InputError, match=r"fits none of 1 files .* the first is 'x.npy'"):
        import_dump(tmp_path, tmp_path / "index", pattern="step_{step}/{name}")
    assert not (tmp_path / "index").exists()


def test_two_files_that_would_be_one_record(tmp_path: Path) -> None:
    save(tmp_path / "x.npy", torch.ones(2))
    save(tmp_path / "x.pt", torch.ones(2))
    with pytest.raises(TraceError, match=r"x.npy and x.pt would both be 'x'.*trimtab trace import .* --pattern"):
        Trace.open(tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.zeros((0, 3), dtype=np.float16),
        np.float32(3.5),
        np.array([True, False]),
        np.arange(3, dtype=np.uint16),
        np.arange(3, dtype=np.complex64),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}",
)
def test_arrays_of_numpy(tmp_path: Path, value: Any) -> None:
    np.save(tmp_path / "x.npy", value)
    trace = Trace.open(tmp_path)
    found = trace.tensor(0).numpy()
    assert found.dtype == np.asarray(value).dtype.newbyteorder("=")
    assert np.array_equal(found, value)
    assert trace.index["shape"].to_list() == [list(np.shape(value))]


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([None]), np.zeros(2, "V2"), np.zeros(2, "M8[s]")])
def test_arrays_that_hold_no_numbers(tmp_path: Path, value: Any) -> None:
    np.save(tmp_path / "x.npy", value)
    trace = Trace.open(tmp_path)
    assert "holds no numbers" in trace.problems[0]
    with pytest.raises(TraceError, match="holds no numbers"):
        trace.tensor(0)


def test_values_are_read_when_asked_for_and_few_files_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.trace.foreign import _values

    for step in range(40):
        save(tmp_path / f"step_{step}" / "x.pt", torch.full((1000,), float(step)))
    trace = Trace.open(tmp_path)
    opened: list[str] = []
    read = _values.read_payload
    monkeypatch.setattr(_values, "read_payload", lambda path: opened.append(path.parent.name) or read(path))
    values = [trace.tensor(record)[0].item() for record in trace.index["record_id"]]
    assert values == [float(step) for step in trace.index["step"]]
    assert len(opened) == 40
    store = trace._run.values
    assert isinstance(store, ForeignValues) and len(store._open) <= 16
    trace.tensor(int(trace.index["record_id"][-1]))
    assert len(opened) == 40


def test_a_tensor_is_a_private_mapping_of_its_file(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.zeros(100))
    before = path.read_bytes()
    Trace.open(tmp_path).tensor(0).add_(1)
    assert path.read_bytes() == before


def test_a_trace_of_ours_without_its_manifest_is_not_taken_for_a_tree(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        writer.write("x", torch.ones(2))
    (tmp_path / "run" / "manifest.json").unlink()
    for path in (tmp_path / "run", tmp_path):
        with pytest.raises(TraceError, match=r"it has no manifest\.json"):
            Trace.open(path)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(TraceError, match="no trace at"):
            Trace.open(path)
        with pytest.raises(TraceError, match=r"holds no \.pt, \.npy or \.safetensors"):
            import_dump(path, tmp_path / "index")


def test_importing_into_what_exists(tmp_path: Path) -> None:
    save(tmp_path / "dump" / "x.npy", torch.ones(2))
    import_dump(tmp_path / "dump", tmp_path / "index")
    with pytest.raises(TraceExistsError, match="not empty"):
        import_dump(tmp_path / "dump", tmp_path / "index")
    with pytest.raises(TraceError, match="a trace of ours already"):
        import_dump(tmp_path / "index", tmp_path / "other")
    with pytest.raises(InputError, match="phase is empty"):
        import_dump(tmp_path / "dump", tmp_path / "third", phase="")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A trace of ours with everything that an export must keep apart."""
    with TraceWriter(tmp_path / "ours", provenance={}) as writer:
        for phase in ("inference", "fwd_bwd"):
            for step in (0, 1):
                for layer in (0, 1):
                    writer.write("h", torch.randn(3, 4), phase=phase, step=step, layer=layer, dims="t h")
                site = {"site": "module:layers.1.a.output", "layer": 1}
                writer.write("y", torch.randn(3, 4).bfloat16(), phase=phase, step=step, **site)
        writer.write("layers.0.w", torch.randn(4, 4), phase="fwd_bwd", step=1, layer=0, kind="param")
        writer.write("layers.0.w", torch.randn(4, 4), phase="fwd_bwd", step=1, layer=0, kind="grad")
        writer.write("a/b___c", torch.randn(2), phase="fwd_bwd", step=1)
        writer.write("n" * 300, torch.randn(2), phase="fwd_bwd", step=1)
        writer.write("h", torch.randn(3, 4), phase="fwd_bwd", step=1, layer=0, micro_step=1, call_index=1)
    return tmp_path / "ours"


def test_an_export_for_sglang_is_the_same_dump(recorded: Path, tmp_path: Path) -> None:
    result = export_dump(recorded, tmp_path / "out")
    assert result.records == 17 and not result.skipped
    assert {name for name, _ in result.renamed} == {"a/b___c", "n" * 300}
    columns = ["phase", "step", "micro_step", "rank", "site", "layer", "kind", "dims", "dtype", "shape"]
    ours, theirs = Trace.open(recorded), Trace.open(tmp_path / "out")
    assert theirs.manifest["plan"]["layout"] == "miles"
    assert theirs.index.select(columns).rows() == ours.index.select(columns).rows()
    named = [row["name"] for row in ours.index.iter_rows(named=True) if row["site"] is None]
    assert named == [row["name"] for row in theirs.index.iter_rows(named=True) if row["site"] is None]
    for mine, exported in zip(ours.index["record_id"], theirs.index["record_id"], strict=True):
        assert torch.equal(ours.tensor(mine), theirs.tensor(exported))


@pytest.mark.parametrize("layout", ["npy", "safetensors"])
def test_an_export_as_a_tree(recorded: Path, tmp_path: Path, layout: Any) -> None:
    result = export_dump(recorded, tmp_path / "out", layout=layout)
    bfloat16 = 4 if layout == "npy" else 0
    assert (result.records, len(result.skipped)) == (17 - bfloat16, bfloat16)
    assert all("numpy has no torch.bfloat16" in reason for _, reason in result.skipped)
    import_dump(tmp_path / "out", tmp_path / "index", pattern="{phase}/step_{step}/rank_{rank}/{name}")
    trace = Trace.open(tmp_path / "index")
    assert trace.index.height == result.records
    suffix = ".value" if layout == "safetensors" else ""
    row = trace.filter(phase="fwd_bwd", step=1, name=f"layers.0.w,layer=0,kind=grad{suffix}").index.row(0, named=True)
    ours = Trace.open(recorded)
    truth = ours.filter(name="layers.0.w", kind="grad").index["record_id"][0]
    assert torch.equal(trace.tensor(row["record_id"]), ours.tensor(truth))


def test_an_export_that_cannot_be(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose one of sglang, npy, safetensors"):
        export_dump(recorded, tmp_path / "out", layout="pt")  # type: ignore[arg-type]
    with pytest.raises(TraceExistsError, match="not empty"):
        export_dump(recorded, recorded)
    with TraceWriter(tmp_path / "odd", provenance={}, level="digests") as writer:
        writer.write("x", torch.ones(2), phase="warmup")
        writer.write("x", torch.ones(2), phase="inference")
    with pytest.raises(InputError, match="no folder for phase 'warmup'"):
        export_dump(tmp_path / "odd", tmp_path / "out")
    assert [reason for _, reason in export_dump(tmp_path / "odd", tmp_path / "out", layout="npy").skipped] == [
        "its values were not kept"
    ] * 2


def test_the_other_verbs_on_a_dump_of_others(tmp_path: Path) -> None:
    save(tmp_path / "dump" / "x.npy", torch.ones(2, 3))
    import_dump(tmp_path / "dump", tmp_path / "index")
    for path in (tmp_path / "dump", tmp_path / "index"):
        checked = verify(path)
        assert (checked.passed, checked.checked, checked.corrupt) == (True, 1, ())
        listing = ls(path)
        assert (listing.records, listing.ranks) == (1, (0,)) and listing.bytes > 0
        assert show(path, 0).values == (1.0,) * 6
    with pytest.raises(TraceError, match=r"it has no manifest\.json"):
        repair(tmp_path / "dump")
    assert repair(tmp_path / "index").rebuilt == ()
    (tmp_path / "dump" / "x.npy").write_bytes(b"")
    assert not verify(tmp_path / "index").passed


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump, index, out = (str(tmp_path / name) for name in ("dump", "index", "out"))
    save(tmp_path / "dump" / "7" / "x.npy", torch.ones(2))
    words = ["trace", "import", dump, "--out", index, "--pattern", "{step}/{name}", "--phase", "fwd_bwd"]
    assert main([*words, "--print-python"]) == 0
    call = f"trimtab.trace.import_dump({dump!r}, {index!r}, pattern='{{step}}/{{name}}', phase='fwd_bwd')"
    assert call in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 1
    assert main(["trace", "export", index, "--out", out, "--layout", "safetensors"]) == 0
    assert [path.relative_to(out).as_posix() for path in Path(out).rglob("*.safetensors")] == [
        "fwd_bwd/step_7/rank_0/x.safetensors"
    ]
    assert main(["trace", "import", dump, "--out", index]) == 2
    assert "not empty" in capsys.readouterr().err
