"""The writer's promises to the program that it runs in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import (
    InputError,
    TraceExistsError,
    TraceLockedError,
    TraceVersionError,
    TraceWriteError,
    UnfinishedError,
)
from trimtab.sites import Site
from trimtab.trace import DoseRow, NullWriter, TokenRow, Trace, TraceWriter
from trimtab.trace._store import LocalStore

TOKEN = TokenRow(config="c", prompt=0, request="r", position=3, token_id=9, text=" a", logprob=-0.5, top_ids=(9, 4))


def open_writer(path: Path, **options: Any) -> TraceWriter:
    return TraceWriter(path, **{"provenance": {}, **options})


def parts(path: Path, table: str = "records") -> list[str]:
    return sorted(one.name for one in (path / "rank-00000" / table).iterdir())


class Gate:
    """Holds every shard back until it is opened: a disk that does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        put = LocalStore.put

        def slow(store: LocalStore, name: str, chunks: Iterable[Any]) -> int:
            if name.endswith(".safetensors"):
                self.reached.set()
                assert self.open.wait(60)
            return put(store, name, chunks)

        monkeypatch.setattr(LocalStore, "put", slow)


def test_later_changes_to_a_tensor_do_not_reach_the_trace(tmp_path: Path) -> None:
    small, large = torch.zeros(4), torch.zeros(1 << 20)
    with open_writer(tmp_path / "run") as writer:
        for step in range(3):
            for tensor in (small, large):
                tensor.fill_(step)
                writer.write("x", tensor, step=step)
        small.fill_(-1), large.fill_(-1)
    trace = Trace.open(tmp_path / "run")
    for record, step in trace.index.select("record_id", "step").iter_rows():
        assert trace.tensor(record).unique().tolist() == [step]


def test_memory_of_committed_snapshots_is_used_again_without_mixing_them_up(tmp_path: Path) -> None:
    tensors = [torch.full((1 << 18,), float(step)) for step in range(24)]
    with open_writer(tmp_path / "run", part_bytes=3 << 20, queue_bytes=6 << 20) as writer:
        for tensor in tensors:
            writer.write("x", tensor)
    trace = Trace.open(tmp_path / "run")
    assert [trace.tensor(record)[0].item() for record in range(24)] == list(range(24))
    assert all(trace.tensor(record).unique().numel() == 1 for record in range(24))
    assert len(parts(tmp_path / "run")) >= 8


def test_write_blocks_only_when_the_queue_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    writer = open_writer(tmp_path / "run", queue_bytes=64 << 10, part_bytes=8 << 10)
    written = []

    def fill() -> None:
        for step in range(16):
            writer.write("x", torch.zeros(2048), step=step)  # 8 KB
            written.append(step)

    thread = threading.Thread(target=fill)
    thread.start()
    assert gate.reached.wait(60)
    thread.join(0.2)  # give it time to fill the queue; it must stop there however long it has
    blocked_at = len(written)
    assert thread.is_alive()
    assert 6 <= blocked_at <= 8  # 64 KiB hold 7 records of 8 KiB and their rows
    gate.open.set()
    thread.join(60)
    writer.close()
    assert Trace.open(tmp_path / "run", incomplete_ok=False).index["step"].to_list() == list(range(16))


def test_a_tensor_larger_than_the_queue_passes(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", queue_bytes=1000, part_bytes=500) as writer:
        for _ in range(4):
            writer.write("x", torch.zeros(1000))
    assert Trace.open(tmp_path / "run").index.height == 4


def test_parts_are_committed_by_size(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", part_bytes=100_000) as writer:
        for _ in range(20):
            writer.write("x", torch.zeros(4000))  # 16 KB: a part after seven
    assert parts(tmp_path / "run") == [f"part-{number:05d}.parquet" for number in range(4)]


def test_parts_are_committed_by_time(tmp_path: Path) -> None:
    committed = threading.Event()
    with open_writer(tmp_path / "run", part_seconds=0.05) as writer:
        part = tmp_path / "run/rank-00000/records/part-00000.parquet"
        writer.write("x", torch.zeros(4))
        for _ in range(2000):
            if part.exists() or committed.wait(0.01):
                break
        assert Trace.open(tmp_path / "run").index.height == 1


def test_flush_commits_and_the_run_is_readable_while_it_is_written(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run") as writer:
        writer.write("x", torch.zeros(4))
        writer.flush()
        writer.write("y", torch.zeros(4))
        trace = Trace.open(tmp_path / "run")
        assert trace.index["name"].to_list() == ["x"]
        assert "still writes here" in trace.problems[0]
        with pytest.raises(UnfinishedError, match="still writes here"):
            Trace.open(tmp_path / "run", incomplete_ok=False)
    assert Trace.open(tmp_path / "run").problems == ()


def test_levels_keep_what_they_say(tmp_path: Path) -> None:
    found = {}
    for level in ("digests", "statistics", "values"):
        with open_writer(tmp_path / level, level=level) as writer:
            writer.write("x", torch.tensor([1.0, -3.0]))
        found[level] = Trace.open(tmp_path / level).index.row(0, named=True)
    assert len({row["digest"] for row in found.values()}) == 1
    assert [row["absmax"] for row in found.values()] == [None, 3.0, 3.0]
    assert [row["shard"] is not None for row in found.values()] == [False, False, True]
    assert not parts(tmp_path / "statistics", "tensors")


def test_record_ids_are_unique_over_ranks_and_name_the_tensor(tmp_path: Path) -> None:
    writers = [open_writer(tmp_path / "run", rank=rank, plan={"steps": 2}) for rank in (1, 0, 12)]
    ids = {
        writer.write("x", torch.tensor([writer.rank]), step=step): writer.rank for writer in writers for step in (0, 1)
    }
    for writer in writers:
        writer.close()
    trace = Trace.open(tmp_path / "run", incomplete_ok=False)
    assert trace.ranks == (0, 1, 12)
    assert trace.index["rank"].to_list() == [0, 0, 1, 1, 12, 12]
    assert len(ids) == 6
    assert all(trace.tensor(record).item() == rank for record, rank in ids.items())


def test_tokens_and_doses_read_back(tmp_path: Path) -> None:
    dose = DoseRow(
        config="c",
        prompt=0,
        request="r",
        site="layers.1.resid_post",
        op="0:Cap",
        position=3,
        p_before=2.5,
        p_after=1.0,
        cap_delta=-1.5,
        clamped=True,
        ratio=0.25,
    )
    with open_writer(tmp_path / "run") as writer:
        writer.write_tokens([TOKEN])
        writer.write_dose([dose])
        writer.write_tokens([])
        with pytest.raises(InputError, match="tokens take TokenRow rows, got DoseRow"):
            writer.write_tokens([dose])  # type: ignore[list-item]
    trace = Trace.open(tmp_path / "run", incomplete_ok=False)
    assert trace.dose.row(0, named=True) == {
        **{name: getattr(dose, name) for name in ("config", "prompt", "request", "site", "op", "position")},
        **{name: getattr(dose, name) for name in ("p_before", "p_after", "cap_delta", "clamped", "ratio")},
    }
    row = trace.tokens.row(0, named=True)
    assert (row["token_id"], row["text"], row["top_ids"], row["logprob"]) == (9, " a", [9, 4], -0.5)
    assert trace.index.height == 0


def test_fields_take_what_numpy_and_torch_call_integers(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run") as writer:
        writer.write("a", torch.ones(2), step=np.int32(4), positions=torch.tensor([3, 4]), site=Site("resid_post", 2))
        writer.write("b", torch.ones(2), positions=range(5, 7), layer=9, site="layers.2.mlp_out")
        writer.write("c", torch.ones(2), positions=np.array([1, 2]), site="module:encoder.layers.1.output", rank=5)
    columns = Trace.open(tmp_path / "run").index.select("step", "layer", "positions", "site", "rank").rows()
    assert columns[0] == (4, 2, [3, 4], "layers.2.resid_post", 0)
    assert columns[1] == (0, 9, [5, 6], "layers.2.mlp_out", 0)
    assert columns[2] == (0, None, [1, 2], "module:encoder.layers.1.output", 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stpe": 1}, "no field 'stpe': did you mean 'step'"),
        ({"step": 1.5}, "step=1.5: Int64 was expected"),
        ({"step": None}, "step=None: leave it out"),
        ({"site": 4}, "site=4: String was expected"),
        ({"edit": "during"}, "edit='during': choose one of none, before, after"),
        ({"kind": "weight"}, "kind='weight': choose one of value, grad, param, optim"),
        ({"positions": "03"}, "positions='03'"),
        ({"positions": [0.5]}, "positions="),
        ({"recompute": 1}, "recompute=1: Boolean was expected"),
    ],
)
def test_fields_that_make_no_sense_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with open_writer(tmp_path / "run") as writer:
        with pytest.raises(InputError, match=message):
            writer.write("x", torch.ones(1), **fields)
        writer.write("good", torch.ones(1))
    assert Trace.open(tmp_path / "run", incomplete_ok=False).index["name"].to_list() == ["good"]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_without_plain_bytes_are_refused(tmp_path: Path) -> None:
    cases = {
        "wrap it: torch.as_tensor": [1.0, 2.0],
        "a meta tensor has no values": torch.ones(2, device="meta"),
        "layout torch.sparse_coo was given; write tensor.to_dense": torch.eye(2).to_sparse(),
    }
    with open_writer(tmp_path / "run") as writer:
        for message, value in cases.items():
            with pytest.raises(InputError, match=message):
                writer.write("x", value)  # type: ignore[arg-type]
        quantised = torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8)
        with pytest.raises(InputError, match=r"a quantised tensor \(torch.qint8\) was given; write tensor.int_repr"):
            writer.write("x", quantised)


def test_a_generation_trace_wants_a_position_per_row(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", kind="generation") as writer:
        with pytest.raises(InputError, match=r"shape \[3, 2\] came with 2 positions; a generation trace takes one per"):
            writer.write("x", torch.ones(3, 2), positions=[0, 1])
        with pytest.raises(InputError, match="came with none positions"):
            writer.write("x", torch.ones(3, 2))


def test_max_bytes_refuses_before_writing(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", max_bytes=100) as writer:
        writer.write("a", torch.ones(20))
        with pytest.raises(
            TraceWriteError, match=r"'b' has 24 bytes and 80 are written: more than max_bytes=100; raise"
        ):
            writer.write("b", torch.ones(6))
        writer.write("c", torch.ones(5))
    assert Trace.open(tmp_path / "run", incomplete_ok=False).index["name"].to_list() == ["a", "c"]


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", plan={"sites": ["a"]}) as writer:
        writer.write("x", torch.ones(1))
    with pytest.raises(TraceExistsError, match="already holds rank-00000 of a 'dump' run; choose another directory"):
        open_writer(tmp_path / "run", plan={"sites": ["a"]})
    with pytest.raises(TraceExistsError, match=r"plan\['sites'\] is \['a'\], not \['b'\]"):
        open_writer(tmp_path / "run", plan={"sites": ["b"]}, rank=1)
    with pytest.raises(TraceExistsError, match="kind is 'dump', not 'generation'"):
        open_writer(tmp_path / "run", kind="generation", resume=True)
    assert Trace.open(tmp_path / "run", incomplete_ok=False).index.height == 1


def test_ranks_that_begin_at_once_share_the_manifest_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.trace import _session

    collect, first = _session.provenance.collect, []

    def slowly() -> dict[str, Any]:
        if not first:  # the other rank is done while this one still looks at its machine
            first.append(None)
            TraceWriter(tmp_path / "t", rank=1).close()
        return collect()

    monkeypatch.setattr(_session.provenance, "collect", slowly)
    TraceWriter(tmp_path / "t", rank=0).close()
    assert first
    assert sorted(one.name for one in (tmp_path / "t").iterdir()) == ["manifest.json", "rank-00000", "rank-00001"]


def test_a_directory_or_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TraceExistsError, match=r"exists and is no trace: it holds notes\.txt"):
        open_writer(tmp_path)
    with pytest.raises(TraceWriteError, match="a file stands where a directory is needed"):
        open_writer(tmp_path / "notes.txt")
    with pytest.raises(TraceWriteError, match="a file stands where a directory is needed"):
        open_writer(tmp_path / "notes.txt" / "run")
    (tmp_path / "empty").mkdir()
    open_writer(tmp_path / "empty").close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run") as writer:
        for resume in (False, True):
            with pytest.raises(TraceLockedError, match="is being written by process"):
                open_writer(tmp_path / "run", resume=resume)
        writer.write("x", torch.ones(1))
    assert Trace.open(tmp_path / "run", incomplete_ok=False).index.height == 1


def test_a_stale_lock_file_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "run/rank-00000").mkdir(parents=True)
    (tmp_path / "run/rank-00000/writer.lock").write_text("99999999\n")
    with open_writer(tmp_path / "run") as writer:
        writer.write("x", torch.ones(1))
    assert Trace.open(tmp_path / "run", incomplete_ok=False).index.height == 1


def test_resume_goes_on_where_the_run_ended(tmp_path: Path) -> None:
    plan = {"steps": 4, "scale": float("inf")}
    for attempt in range(3):
        with open_writer(tmp_path / "run", plan=plan, resume=True, max_bytes=8 * (attempt + 1)) as writer:
            writer.write("x", torch.tensor([attempt]), step=attempt)
            with pytest.raises(TraceWriteError, match=f"{8 * (attempt + 1)} are written"):
                writer.write("y", torch.tensor([attempt]))
    trace = Trace.open(tmp_path / "run", incomplete_ok=False)
    assert trace.index["record_id"].to_list() == [0, 1, 2]
    assert [trace.tensor(record).item() for record in range(3)] == [0, 1, 2]
    assert len(parts(tmp_path / "run")) == 3


def test_resume_recovers_the_shard_that_a_killed_writer_left(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run") as writer:
        for step in range(3):
            writer.write("x", torch.tensor([step]), step=step)
            writer.flush()
    rank = tmp_path / "run/rank-00000"
    (rank / "closed.json").unlink()
    (rank / "records/part-00002.parquet").unlink()
    (rank / "tensors/.part-00003.safetensors.77.tmp").write_bytes(b"half")
    with open_writer(tmp_path / "run", resume=True) as writer:
        assert writer.write("x", torch.tensor([3]), step=3) == 3
    trace = Trace.open(tmp_path / "run", incomplete_ok=False)
    assert [trace.tensor(record).item() for record in trace.index["record_id"]] == [0, 1, 2, 3]
    assert parts(tmp_path / "run", "tensors") == [f"part-{number:05d}.safetensors" for number in range(4)]


def test_a_header_stays_under_the_limit_of_the_safetensors_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.trace._parts.HEADER_LIMIT", 60_000)
    with open_writer(tmp_path / "run") as writer:
        for step in range(100):
            writer.write("n" * 500, torch.tensor(1.0), step=step)
    shards = (tmp_path / "run/rank-00000/tensors").iterdir()
    assert 2 <= len([shard for shard in shards if shard.stat().st_size < 60_000]) <= 10
    assert Trace.open(tmp_path / "run", incomplete_ok=False).index.height == 100


def test_several_blocked_producers_all_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    writer = open_writer(tmp_path / "run", queue_bytes=20_000, part_bytes=5_000)
    row = DoseRow(
        config="c",
        prompt=0,
        request="r",
        site="embed",
        op="0:Add",
        position=0,
        p_before=0.0,
        p_after=1.0,
        cap_delta=0.0,
        clamped=False,
        ratio=1.0,
    )
    jobs = [lambda: writer.write("x", torch.zeros(1000))] * 10, [lambda: writer.write_dose([row] * 30)] * 10
    threads = [threading.Thread(target=lambda jobs=jobs: [job() for job in jobs]) for jobs in jobs]
    for thread in threads:
        thread.start()
    assert gate.reached.wait(60)
    gate.open.set()
    for thread in threads:
        thread.join(20)  # parts are due by time after 30 s only
    assert not any(thread.is_alive() for thread in threads)
    writer.close()
    trace = Trace.open(tmp_path / "run", incomplete_ok=False)
    assert (trace.index.height, trace.dose.height) == (10, 300)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_a_gpu_are_copied_before_write_returns(tmp_path: Path) -> None:
    small, large = torch.zeros(4, 3, device="cuda").t(), torch.zeros(1 << 20, device="cuda")
    with open_writer(tmp_path / "run") as writer:
        for step in range(3):
            for tensor in (small, large):
                tensor.fill_(step)
                writer.write("x", tensor, step=step)
    trace = Trace.open(tmp_path / "run", incomplete_ok=False)
    assert all(trace.tensor(record).unique().tolist() == [record // 2] for record in range(6))


def test_a_block_that_raises_commits_what_it_wrote_and_says_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_writer(tmp_path / "run") as writer:
        writer.write("x", torch.ones(1))
        raise ZeroDivisionError("step 7")
    trace = Trace.open(tmp_path / "run")
    assert trace.index.height == 1
    assert trace.problems == ("rank-00000: the run ended early: ZeroDivisionError: step 7",)
    assert not trace.damaged
    with pytest.raises(UnfinishedError, match="the run ended early: ZeroDivisionError: step 7"):
        Trace.open(tmp_path / "run", incomplete_ok=False)


def test_a_closed_writer_refuses(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    writer.close()
    writer.close()
    with pytest.raises(TraceWriteError, match="is closed; open it again with resume=True"):
        writer.write("x", torch.ones(1))


def test_plans_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be plain JSON"):
        open_writer(tmp_path / "run", plan={"dtype": torch.float32})
    with pytest.raises(InputError, match=r"level 'all': choose one of digests, statistics, values"):
        open_writer(tmp_path / "run", level="all")
    with pytest.raises(InputError, match="queue_bytes=0: a positive number"):
        open_writer(tmp_path / "run", queue_bytes=0)
    with pytest.raises(InputError, match="rank -1"):
        open_writer(tmp_path / "run", rank=-1)
    assert not (tmp_path / "run").exists()


def test_a_newer_format_is_refused_by_reader_and_writer(tmp_path: Path) -> None:
    open_writer(tmp_path / "run").close()
    manifest = tmp_path / "run/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    for attempt in (lambda: Trace.open(tmp_path / "run"), lambda: open_writer(tmp_path / "run", resume=True)):
        with pytest.raises(TraceVersionError, match="format version 2; this trimtab reads versions up to 1: upgrade"):
            attempt()


def test_provenance_is_collected_unless_given(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "run", plan={"steps": 3}).close()
    manifest = Trace.open(tmp_path / "run").manifest
    assert (manifest["format_version"], manifest["kind"], manifest["level"]) == (1, "dump", "values")
    assert manifest["plan"] == {"steps": 3}
    assert manifest["provenance"]["packages"]["torch"] == torch.__version__


def test_the_null_writer_has_the_same_face(tmp_path: Path) -> None:
    with NullWriter() as writer:
        assert [writer.write("x", torch.ones(1), step=step) for step in range(2)] == [0, 1]
        writer.write_tokens([TOKEN])
        writer.write_dose([])
        writer.flush()
    public = {name for name in vars(TraceWriter) if not name.startswith("_")}
    assert public <= {name for name in dir(NullWriter) if not name.startswith("_")}


def test_writing_from_several_threads_keeps_every_record_once(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", queue_bytes=200_000, part_bytes=50_000) as writer:

        def fill(number: int) -> None:
            for step in range(50):
                writer.write("x", torch.full((100,), number * 100 + step), step=step, rank=number)

        threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace = Trace.open(tmp_path / "run", incomplete_ok=False)
    assert sorted(trace.index["record_id"].to_list()) == list(range(200))
    rows = trace.index.select("record_id", "rank", "step").iter_rows()
    assert all(trace.tensor(record)[0].item() == rank * 100 + step for record, rank, step in rows)
