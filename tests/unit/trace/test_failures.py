"""What goes wrong on a disk is one clear error, and what was committed stays readable."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.errors import TraceCorruptError, TraceError, TraceWriteError
from trimtab.trace import Trace, TraceWriter, repair, verify
from trimtab.trace._store import LocalStore


def open_writer(path: Path, **options: Any) -> TraceWriter:
    return TraceWriter(path, **{"provenance": {}, **options})


def write_run(path: Path, steps: int = 6) -> Path:
    """A run of one record per part; record k holds k."""
    with open_writer(path) as writer:
        for step in range(steps):
            writer.write("x", torch.full((100,), float(step)), step=step)
            writer.flush()
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user cannot mount a small disk; the forced ENOSPC test covers the same path")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_keeps_what_was_committed(small_disk: Path) -> None:
    writer = open_writer(small_disk / "run", part_bytes=100_000)
    written = 0
    with pytest.raises(TraceWriteError, match=r"No space left on device; \d+ bytes are free") as caught:
        for step in range(200):
            writer.write("x", torch.full((8192,), float(step)), step=step)
            written += 1
            writer.flush()
    with pytest.raises(TraceWriteError, match="No space left"):
        writer.close()
    assert "\n" not in str(caught.value)
    trace = Trace.open(small_disk / "run")
    steps = trace.index["step"].to_list()
    assert steps == list(range(len(steps)))
    assert 20 <= len(steps) < written
    assert all(trace.tensor(record)[-1].item() == record for record in steps)
    assert "ended without closing" in trace.problems[0]
    assert f"({len(steps)} records of this writer)" in str(caught.value)


@pytest.mark.parametrize("raised_by", ["write", "flush", "close"])
def test_a_failed_write_is_an_error_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised_by: str
) -> None:
    writer = open_writer(tmp_path / "run", part_bytes=50_000)
    writer.write("good", torch.ones(10))
    writer.flush()
    sync = os.fsync

    def full(handle: int) -> None:
        if ".safetensors" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    writer.write("lost", torch.ones(10))
    with pytest.raises(TraceWriteError, match=r"part-00001\.safetensors: No space left on device"):
        if raised_by == "flush":
            writer.flush()
        elif raised_by == "close":
            writer.close()
        else:
            for _ in range(100_000):
                writer.write("lost", torch.ones(10_000))
    monkeypatch.undo()
    if raised_by != "close":
        with pytest.raises(TraceWriteError, match="No space left"):
            writer.write("again", torch.ones(1))
        with pytest.raises(TraceWriteError, match="No space left"):
            writer.close()
    trace = Trace.open(tmp_path / "run")
    assert trace.index["name"].to_list() == ["good"]
    assert not list((tmp_path / "run/rank-00000/tensors").glob(".*"))
    with open_writer(tmp_path / "run", resume=True) as again:
        again.write("more", torch.ones(3))
    assert Trace.open(tmp_path / "run", incomplete_ok=False).index["name"].to_list() == ["good", "more"]


def test_a_blocked_producer_wakes_when_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: LocalStore, name: str, chunks: Any) -> int:
        raise TraceWriteError("the disk is gone")

    writer = open_writer(tmp_path / "run", queue_bytes=10_000, part_bytes=5_000)
    monkeypatch.setattr(LocalStore, "put", refuse)
    with pytest.raises(TraceWriteError, match="the disk is gone"):
        for _ in range(1000):
            writer.write("x", torch.ones(1000))
    with pytest.raises(TraceWriteError, match="the disk is gone"):
        writer.close()


def test_the_error_of_the_block_is_the_one_that_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: LocalStore, name: str, chunks: Any) -> int:
        raise TraceWriteError("the disk is gone")

    with pytest.raises(ZeroDivisionError) as caught, open_writer(tmp_path / "run") as writer:
        writer.write("x", torch.ones(1))
        monkeypatch.setattr(LocalStore, "put", refuse)
        raise ZeroDivisionError
    assert "the disk is gone" in caught.value.__notes__[0]


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Path]:
    """A directory with a run, seen by a user who may not write there (nothing is forbidden to root)."""
    place = tmp_path / "sealed"
    place.mkdir()
    write_run(place / "run", steps=1)
    folders = [place, *(one for one in place.rglob("*") if one.is_dir())]
    parents = [one for one in tmp_path.parents if one.stat().st_mode & 0o777 == 0o700] + [tmp_path]
    for folder in folders:
        folder.chmod(0o555)
    for folder in parents:
        folder.chmod(0o711)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield place
    if root:
        os.seteuid(0)
    for folder in (*folders, *parents):
        folder.chmod(0o700)


def test_permission_denied(sealed: Path) -> None:
    with pytest.raises(TraceWriteError, match="Permission denied; give a directory that this user may write to"):
        open_writer(sealed / "new")
    with pytest.raises(TraceWriteError, match="Permission denied; give a directory that this user may write to"):
        open_writer(sealed / "run", resume=True)
    trace = Trace.open(sealed / "run")
    assert (trace.index.height, trace.problems) == (1, ())


def test_no_trace_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TraceError, match=r"it has no manifest\.json; there is: notes\.txt"):
        Trace.open(tmp_path)
    with pytest.raises(TraceError, match="nothing is there; give the directory of a run"):
        Trace.open(tmp_path / "no/such")
    with pytest.raises(TraceError, match=r"notes\.txt: it is a file; give the directory of a run"):
        Trace.open(tmp_path / "notes.txt")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "dump"}', '{"format_version": "1"}'])
def test_a_manifest_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    write_run(tmp_path / "run", steps=1)
    (tmp_path / "run/manifest.json").write_text(text)
    with pytest.raises(TraceError, match=r"manifest\.json cannot be read|format version") as caught:
        Trace.open(tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 40, -1], ids=lambda keep: f"keep {keep}")
def test_a_truncated_shard_costs_its_own_records_only(tmp_path: Path, keep: int) -> None:
    run = write_run(tmp_path / "run")
    shard = run / "rank-00000/tensors/part-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    trace = Trace.open(run)
    assert len(trace.problems) == 1
    assert "part-00002.safetensors: truncated or changed" in trace.problems[0]
    assert [trace.tensor(record)[0].item() for record in (0, 1, 3, 4, 5)] == [0, 1, 3, 4, 5]
    with pytest.raises(TraceCorruptError, match=r"part-00002.safetensors is truncated or corrupt: .*other shards stay"):
        trace.tensor(2)
    with pytest.raises(TraceCorruptError, match="is not whole"):
        Trace.open(run, incomplete_ok=False)
    assert not verify(run).passed


@pytest.mark.parametrize("keep", [0, 5, -1, -30], ids=lambda keep: f"keep {keep}")
def test_a_truncated_part_is_named_and_rebuilt_from_its_shard(tmp_path: Path, keep: int) -> None:
    run = write_run(tmp_path / "run")
    before = Trace.open(run).index
    part = run / "rank-00000/records/part-00002.parquet"
    part.write_bytes(part.read_bytes()[:keep])
    trace = Trace.open(run)
    assert trace.index["step"].to_list() == [0, 1, 3, 4, 5]
    assert "part-00002.parquet: truncated or corrupt; run trace repair" in trace.problems[0]
    with pytest.raises(TraceCorruptError, match="part-00002"):
        Trace.open(run, incomplete_ok=False)
    result = repair(run)
    assert (result.rebuilt, result.records, result.lost) == (("rank-00000/records/part-00002.parquet",), 1, ())
    assert Trace.open(run, incomplete_ok=False).index.equals(before)


def test_a_part_with_broken_pages_is_named_when_it_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    part = run / "rank-00000/records/part-00001.parquet"
    data = bytearray(part.read_bytes())
    data[4:400] = bytes(396)  # the pages; the footer at the end is left alone
    part.write_bytes(data)
    with pytest.raises(TraceCorruptError, match=r"part-00001\.parquet is corrupt .*run trace repair"):
        _ = Trace.open(run).index
    part.unlink()
    repair(run)
    assert Trace.open(run, incomplete_ok=False).index.height == 6


def test_a_missing_part_or_shard_is_missed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "rank-00000/tensors/part-00000.safetensors").unlink()
    (run / "rank-00000/records/part-00003.parquet").unlink()
    (run / "rank-00000/tensors/part-00003.safetensors").unlink()
    problems = "; ".join(Trace.open(run).problems)
    assert "part-00000.safetensors: the shard is missing" in problems
    assert "1 of 6 records parts are missing" in problems
    assert "1 of 6 records are missing or unreadable" in problems
    with pytest.raises(TraceCorruptError, match=r"part-00000.safetensors is missing"):
        Trace.open(run).tensor(0)
    assert len(repair(run).lost) >= 2


def test_one_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shard = run / "rank-00000/tensors/part-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    result = verify(run)
    assert (result.records, result.checked, result.passed) == (6, 5, False)
    assert [(one.record_id, one.name) for one in result.corrupt] == [(4, "x")]
    assert "its bytes hash to" in result.corrupt[0].reason


def test_an_index_that_was_edited_is_found_by_verify(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    source, target = (run / f"rank-00000/records/part-0000{number}.parquet" for number in (1, 2))
    target.write_bytes(source.read_bytes())
    result = verify(run)
    assert not result.passed


KILLED = """
import os, signal, sys, torch
from trimtab.trace import TraceWriter
from trimtab.numerics import tensor_statistics
from trimtab.trace._store import LocalStore

tensor_statistics(torch.ones(2))  # compiled once, not once per child
put = LocalStore.put
shard, part = "tensors/part-00003.safetensors", "records/part-00003.parquet"

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def run(path, moment):
    def killing(store, name, chunks):
        if moment == "before shard" and name.endswith(shard):
            die()
        size = put(store, name, cut(chunks) if moment == "inside shard" and name.endswith(shard) else chunks)
        if (moment, name[11:]) in (("after shard", shard), ("after part", part)):
            die()
        return size

    def cut(chunks):
        yield from chunks
        die()

    LocalStore.put = killing
    writer = TraceWriter(path, provenance={}, plan={"steps": 10})
    for step in range(10):
        writer.write("x", torch.full((1000,), float(step)), step=step)
        if step != 9:
            writer.flush()
    if moment == "before close":
        die()

for moment in sys.argv[2:]:
    child = os.fork()  # no thread runs yet
    if not child:
        run(f"{sys.argv[1]}/{moment}", moment)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""
MOMENTS = {
    "before shard": (3, 0),
    "inside shard": (3, 0),
    "after shard": (3, 1),
    "after part": (4, 0),
    "before close": (9, 0),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(place), *MOMENTS]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_writer_loses_only_what_it_had_not_committed(killed: Path, moment: str) -> None:
    there, rebuilt = MOMENTS[moment]
    run = killed / moment
    trace = Trace.open(run)
    assert trace.index["step"].to_list() == list(range(there))
    assert all(trace.tensor(step).unique().tolist() == [step] for step in range(there))
    assert "rank-00000: the writer ended without closing" in trace.problems[0]

    result = repair(run)
    assert (result.records, result.lost) == (rebuilt, ())
    assert bool(result.deleted) == (moment == "inside shard")
    trace = Trace.open(run)
    assert trace.index["step"].to_list() == list(range(there + rebuilt))
    assert trace.problems == ("rank-00000: the run ended early: the writer was killed; repaired",)
    assert verify(run).passed

    with open_writer(run, plan={"steps": 10}, resume=True) as writer:
        for step in range(there + rebuilt, 10):
            writer.write("x", torch.full((1000,), float(step)), step=step)
    trace = Trace.open(run, incomplete_ok=False)
    assert trace.index["step"].to_list() == list(range(10))
    assert all(trace.tensor(step).unique().tolist() == [step] for step in range(10))


def test_a_rebuilt_index_equals_the_one_that_was_lost(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run") as writer:
        for step in range(5):
            values = torch.randn(3, 4)
            values[0, 0] = (float("nan"), float("inf"), 1.0, -float("inf"), 0.0)[step]
            writer.write(
                f"weird \N{SNOWMAN} {step}",
                values.to([torch.float16, torch.complex64][step % 2]),
                site="layers.1.mlp_out" if step else None,
                step=step,
                positions=[step, step + 1, step + 2] if step % 2 else None,
                recompute=step == 3,
                request="r" if step > 1 else None,
            )
    before = Trace.open(tmp_path / "run").index
    (tmp_path / "run/rank-00000/records/part-00000.parquet").unlink()
    assert Trace.open(tmp_path / "run").index.height == 0
    assert repair(tmp_path / "run").records == 5
    assert Trace.open(tmp_path / "run", incomplete_ok=False).index.equals(before)


AT_ANY_TIME = """
import os, random, select, signal, sys, torch
from trimtab.trace import TraceWriter
from trimtab.numerics import tensor_statistics

tensor_statistics(torch.ones(2))  # compiled once, not once per child
source = random.Random(int(sys.argv[2]))

def run(path, told):
    writer = TraceWriter(path, provenance={})  # most of its time goes into the bytes of shards
    for step in range(100_000):
        writer.write("x", torch.full((150_000 + step,), float(step)), step=step)
        if step % 3 == 2:
            writer.flush()
            os.write(told, (step + 1).to_bytes(4, "little"))

for number in range(int(sys.argv[3])):
    here, told = os.pipe()
    child = os.fork()  # no thread runs yet
    if not child:
        run(f"{sys.argv[1]}/{number}", told)
    os.close(told)
    for _ in range(source.randrange(6)):  # so many commits, and then any time within the next ones
        os.read(here, 4)
    select.select([], [], [], source.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(here, "rb") as pipe:
        said = pipe.read()
    print(int.from_bytes(said[-4:], "little"), flush=True)
"""


@pytest.mark.parametrize("times", [pytest.param(12, id="12"), pytest.param(200, id="200", marks=pytest.mark.full)])
def test_a_writer_killed_at_any_time_shows_all_that_it_committed_and_nothing_half(times: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_ANY_TIME, str(tmp_path), "7", str(times)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number, line in enumerate(done.stdout.split()):
        run = tmp_path / str(number)
        if not (run / "manifest.json").exists():
            assert line == "0"
            continue
        for _ in range(2):  # as it was left, and repaired
            trace = Trace.open(run)
            steps = trace.index["step"].to_list()
            assert steps == list(range(len(steps)))
            assert len(steps) >= int(line)
            for step in steps:
                assert torch.equal(trace.tensor(step), torch.full((150_000 + step,), float(step)))
            repair(run)
        assert verify(run).passed
