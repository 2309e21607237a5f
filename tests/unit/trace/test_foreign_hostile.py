"""Files made to harm: they are records with a reason. Nothing crashes, hangs, runs code, or eats the memory."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import trimtab
from trimtab.errors import TraceCorruptError, TrimtabError
from trimtab.trace import Trace, import_dump
from trimtab.trace.foreign import ForeignValues

STEM = "step=0___rank=0___dump_index=1___name=x___recompute_status=disabled"
RAN = Path("ran")


def archive(entries: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return stream.getvalue()


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def with_pickle(value: Any, data: bytes) -> bytes:
    """A file of torch.save with another structure."""
    with zipfile.ZipFile(io.BytesIO(saved(value))) as file:
        entries = {one.filename: file.read(one) for one in file.infolist()}
    return archive({name: data if name.endswith("data.pkl") else old for name, old in entries.items()})


def overlapping(count: int) -> bytes:
    """An archive that lists one entry under many names, so that unpacking multiplies it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02N.")
        file.writestr("a/data/0", bytes(100_000))
        for number in range(1, count):
            again = copy.copy(file.filelist[1])
            again.filename = f"a/data/{number}"
            file.filelist.append(again)
    return stream.getvalue()


class Runs:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (RAN,)


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def laughs(levels: int) -> bytes:
    """Lists of ten times the list before, shared: small in the file, 10**levels leaves for who walks them."""
    data = b"\x80\x02]q\x00(" + b"K\x01" * 10 + b"e"
    for level in range(levels):
        data += b"]q" + bytes([level + 1]) + b"(" + (b"h" + bytes([level])) * 10 + b"e"
    return data + b"."


def absurd(shape: tuple[int, ...], stride: tuple[int, ...], numel: int = 4) -> bytes:
    """A tensor of any shape over a storage of a few numbers."""
    integers = lambda values: b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", one) for one in values) + b"t"  # noqa: E731
    number = b"\x8a\x08" + struct.pack("<q", numel)
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number + b"tQ"
    rebuild = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return rebuild + storage + b"K\x00" + integers(shape) + integers(stride) + hooks + b"tR."


BOMB = archive({"a/data.pkl": b"\x80\x02N.", "a/data/0": bytes(1 << 24)}, compression=zipfile.ZIP_DEFLATED)
NPY = np.lib.format.magic(1, 0) + b"\x46\x00"
HEADER = saved({"value": torch.ones(4), "meta": {}})

PT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no archive"),
    "text": (b"hello world" * 10, "no archive"),
    "an old pickle": (pickle.dumps([1, 2]), "no archive"),
    "truncated": (HEADER[: len(HEADER) // 2], "damaged archive"),
    "a compressed bomb": (BOMB, "compressed"),
    "overlapping entries": (overlapping(50), "its entries claim 5000004 bytes of"),
    "a pickle in a zip": (archive({"a/data.pkl": pickle.dumps(Runs(), 2)}), "could run code"),
    "a pickle of a later protocol": (archive({"a/data.pkl": pickle.dumps(Runs(), 4)}), "opcode STACK_GLOBAL"),
    "numbers of numpy": (saved([np.int64(3), np.int64(4)]), "numpy"),
    "a list of a number of numpy": (saved([np.int64(3)]), "numpy"),
    "a tag that is a number of numpy": (saved({"value": 5, "meta": {"tag": np.int64(3)}}), "numpy"),
    "a number of numpy inside": (saved({"value": {"a": np.int64(3)}, "meta": {}}), "numpy"),
    "an array of numpy": (saved(np.arange(3)), "numpy"),
    "a whole module": (saved(torch.nn.Linear(2, 2)), "could run code"),
    "an array of bytes": (
        with_pickle(1, b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + b"\0\0\0\0\x10" + b"\x85R."),
        "run code",
    ),
    "no pickle": (archive({"a/data/0": b"1234"}), "0 entries data.pkl"),
    "two pickles": (archive({"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "2 entries data.pkl"),
    "a structure of nothing": (with_pickle(1, b""), "damaged structure"),
    "a structure of noise": (with_pickle(1, bytes(range(256))), "damaged structure"),
    "a large structure": (with_pickle(1, b"\x80\x02(" + b"K\x01" * (5 << 20) + b"l."), "its structure has"),
    "nested lists": (with_pickle(1, nested(5000)), "nested more than 16 deep"),
    "shared lists": (with_pickle(1, laughs(12)), "more than 10000 values"),
    "an absurd shape": (with_pickle(torch.ones(4), absurd((1 << 40, 4), (0, 1))), "claims 17592186044416 bytes"),
    "an impossible shape": (with_pickle(torch.ones(4), absurd((1 << 40, 4), (4, 1))), "torch cannot load it"),
    "an overflowing shape": (with_pickle(torch.ones(4), absurd((1 << 62, 1 << 62), (0, 0))), "torch cannot load it"),
    "a negative shape": (with_pickle(torch.ones(4), absurd((-4,), (1,))), "torch cannot load it"),
    "a storage beyond the file": (with_pickle(torch.ones(4), absurd((1 << 34,), (1,), 1 << 34)), ""),
    "sparse": (saved(torch.eye(3).to_sparse()), "could run code"),
    "a path out of the archive": (archive({"../../data.pkl": b"\x80\x02N."}), "torch cannot load it"),
}


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not RAN.exists(), "code of a file was run"


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(("data", "reason"), PT.values(), ids=PT.keys())
def test_a_hostile_file_is_a_record_with_its_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    folder = tmp_path / "dump"
    folder.mkdir()
    (folder / f"{STEM}.pt").write_bytes(data)
    torch.save({"value": torch.ones(2), "meta": {}}, folder / f"{STEM.replace('index=1', 'index=2')}___k=1.pt")
    before = peak()
    trace = Trace.open(folder)
    assert peak() - before < 200 << 20
    assert trace.index["name"].to_list() == ["x", "x[k=1]"]
    assert len(trace.problems) == 1 and reason in trace.problems[0] and "\n" not in trace.problems[0]
    with pytest.raises(TraceCorruptError, match=r"dump/step=0.*: .") as caught:
        trace.tensor(0)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert trace.tensor(1).tolist() == [1.0, 1.0]


def test_compare_and_import_keep_the_rest(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        for index in (1, 2, 3):
            stem = f"step=0___rank=0___dump_index={index}___name=x{index}"
            torch.save({"value": torch.ones(2) * index, "meta": {}}, tmp_path / side / f"{stem}.pt")
    (tmp_path / "b" / "step=0___rank=0___dump_index=2___name=x2.pt").write_bytes(BOMB)
    result = trimtab.compare(tmp_path / "a", tmp_path / "b")
    assert {record.key.name: record.status for record in result.records} == {
        **{"x1": "passed", "x2": "corrupt", "x3": "passed"}
    }
    assert not result.passed
    assert any("compressed" in entry.reason for entry in result.ledger.entries if entry.kind == "corrupt")
    found = import_dump(tmp_path / "b", tmp_path / "index")
    assert found.records == 3 and "compressed" in found.unreadable[0][1]
    with pytest.raises(TraceCorruptError, match="compressed"):
        Trace.open(tmp_path / "index").tensor(1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be read"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'", "cannot be read"),
        (b"\x93NUMPY\x07\x00", "cannot be read"),
        (NPY + b"{'descr':'<f4','fortran_order':False,'shape':(1099511627776,)}".ljust(70), "claims"),
        (NPY + b"{'descr':'<f4','fortran_order':False,'shape':(-4,-4)}".ljust(70), "impossible"),
        (NPY + b"{'descr':'|O','fortran_order':False,'shape':(1,)}".ljust(70), "no numbers"),
        (NPY + b"__import__('pathlib').Path('ran').touch()".ljust(70), "cannot be read"),
    ],
)  # fmt: skip
def test_hostile_arrays(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    assert reason in Trace.open(tmp_path).problems[0]


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not json",
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1600]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
        b'{"a":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}',
    ],
)
def test_hostile_safetensors(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "cannot be read" in Trace.open(tmp_path).problems[0]
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + header)
    assert "cannot be read" in Trace.open(tmp_path).problems[0]


def test_what_is_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    folder.mkdir()
    os.mkfifo(folder / "pipe.pt")
    (folder / "loop.pt").symlink_to("loop.pt")
    (folder / "gone.npy").symlink_to("nothing.npy")
    (folder / "around").symlink_to(folder, target_is_directory=True)
    (folder / "folder.pt").mkdir()
    save_file({"a": torch.ones(2)}, folder / "ok.safetensors")
    trace = Trace.open(folder)
    assert sorted(trace.index["name"]) == ["gone", "loop", "ok.a", "pipe"]
    reasons = {one["file"]: one["reason"] for one in trace.manifest["plan"]["unreadable"]}
    assert "no regular file" in reasons["pipe.pt"]
    assert len(reasons) == 3


NAMES = [
    "..",
    "/abs",
    "n" * 180,
    "___",
    "a___",
    "___=",
    "=",
    "x=y",
    "a\nb",
    "a b",
    "*",
    "\u00e9\u4e2d",
    "'\"",
    "%s{}",
]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"step=0___rank=0___dump_index=1___name={name}___recompute_status=disabled.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"value": torch.ones(2), "meta": {"name": name, "step": 0, "rank": 0, "dump_index": 1}}, path)
    trace = Trace.open(tmp_path)
    assert trace.index["name"].to_list() == [name]
    assert trace.tensor(0).tolist() == [1.0, 1.0]
    assert trimtab.compare(tmp_path, tmp_path).passed
    import_dump(tmp_path, tmp_path / "index")
    assert Trace.open(tmp_path / "index").tensor(0).tolist() == [1.0, 1.0]


def test_a_name_that_moves_its_file(tmp_path: Path) -> None:
    for index, name in enumerate(("x", "../../up", "a/../b"), start=1):
        path = tmp_path / f"step=0___rank=0___dump_index={index}___name={name}___recompute_status=disabled.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = {"name": name, "step": 0, "rank": 0, "dump_index": index}
        torch.save({"value": torch.ones(index), "meta": meta}, path)
    trace = Trace.open(tmp_path)
    assert trace.index.select("name", "shape").rows() == [("x", [1]), ("../../up", [2]), ("a/../b", [3])]
    assert trace.problems == ()


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    with open(folder + b"/\xff\xfe.npy", "wb") as stream:  # noqa: PTH123 - a name of bytes
        np.save(stream, np.ones(2))
    trace = Trace.open(tmp_path)
    assert "no UTF-8 text" in trace.problems[0]
    import_dump(tmp_path, tmp_path / "index")


HOSTILE_META: list[Any] = [
    {"name": 3}, {"name": None}, {"step": "x"}, {"step": True}, {"step": 1 << 70}, {"rank": -1}, {"rank": 1 << 40},
    {"layer_id": "../.."}, {"layer_id": [1]}, {"dims": 3}, {"dims": "b s h[tp"}, {1: 2}, {"name": "x\0y"},
    {"sglang_parallel_info": [1]}, {"sglang_parallel_info": {"tp_rank": "1", 3: 4}}, {"dump_index": None},
    {"micro_step": {}}, {"tag": {"a": [1]}}, {"name": "n" * 100_000}, "text", [1], None,
]  # fmt: skip


@pytest.mark.parametrize("meta", HOSTILE_META, ids=lambda meta: repr(meta)[:40])
def test_hostile_metadata(tmp_path: Path, meta: Any) -> None:
    torch.save({"value": torch.ones(2), "meta": meta}, tmp_path / f"{STEM}.pt")
    trace = Trace.open(tmp_path)
    assert trace.index.height == 1
    try:
        assert trace.tensor(0).tolist() == [1.0, 1.0]
    except TraceCorruptError as error:
        assert "is no number" in str(error) or "is outside of" in str(error)
    import_dump(tmp_path, tmp_path / "index")
    assert Trace.open(tmp_path / "index").index.equals(trace.index)


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../secret.pt", "a/../../secret.pt", "x\0.pt", "secret", "n" * 5000 + ".pt", "missing.pt"]
)
def test_an_index_that_points_out_of_the_dump(tmp_path: Path, shard: str) -> None:
    torch.save(torch.ones(2), tmp_path / "secret.pt")
    (tmp_path / "dump").mkdir()
    values = ForeignValues(str(tmp_path / "dump"), {})
    with pytest.raises(TraceCorruptError, match=r"outside of the dump|No such file|name too long"):
        values.tensor(shard, "[]", "float32", [2])


@pytest.mark.parametrize(
    "key", ["", "nothing", "{}", "[null]", '["meta"]', '["value", 0, 0]', "[" * 100_000, "[1e999]"]
)
def test_an_index_that_points_nowhere_in_the_file(tmp_path: Path, key: str) -> None:
    torch.save({"value": torch.ones(2), "meta": {}}, tmp_path / "x.pt")
    with pytest.raises(TraceCorruptError):
        ForeignValues(str(tmp_path), {}).tensor("x.pt", key, "float32", [2])


def mutate(data: bytes, source: random.Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite; often near the structure, where it matters."""
    found = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 5, 20))):
        at = source.randrange(len(found)) if found else 0
        what = source.randrange(6)
        if what == 0 and found:
            found[at] ^= 1 << source.randrange(8)
        elif what == 1 and found:
            found[at] = source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))
        elif what == 2:
            del found[at : at + source.choice((1, 4, 64))]
        elif what == 3:
            found[at:at] = source.randbytes(source.choice((1, 4, 16)))
        elif what == 4:
            found[at : at + 8] = source.choice((b"\xff" * 8, b"\0" * 8, b"\0\0\0\0\0\0\0\x7f", b"\1\0\0\0\0\0\0\0"))
        else:
            del found[source.randrange(len(found) + 1) :]
    return bytes(found)


def seeds(folder: Path) -> list[tuple[str, bytes]]:
    meta = {"name": "x", "step": 0, "rank": 0, "dump_index": 1, "layer_id": 3, "sglang_parallel_info": {"tp_rank": 0}}
    values = [torch.randn(3, 4), torch.ones(5, dtype=torch.bfloat16), {"a": [torch.ones(2), 1, "t"]}, torch.arange(6)]
    found = [(f"{STEM}.pt", saved({"value": value, "meta": meta})) for value in values]
    found += [("w.pt", saved(torch.nn.Linear(3, 2).state_dict())), ("t.pt", saved(torch.nn.Parameter(torch.ones(2))))]
    np.save(folder / "x.npy", np.arange(6.0).reshape(2, 3))
    save_file({"a": torch.ones(2, 3), "b": torch.arange(4)}, folder / "x.safetensors")
    for name in ("x.npy", "x.safetensors"):
        found += [(name, (folder / name).read_bytes())] * 2
        (folder / name).unlink()
    return found


def fuzz(folder: Path, rounds: int) -> dict[str, int]:
    """Open, read, import and compare mutated files; every outcome is a tensor or one of our errors."""
    source = random.Random(2024)
    originals = seeds(folder)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(rounds):
        name, data = source.choice(originals)
        if source.random() < 0.1:
            data = source.randbytes(source.randrange(200))
            data = source.choice((b"", b"PK\3\4", b"\x93NUMPY\1\0")) + data
        elif name.endswith(".pt") and source.random() < 0.5:  # a sound archive around a damaged structure
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                entries = {one.filename: file.read(one) for one in file.infolist()}
            inside = source.choice([one for one in entries if one.endswith(("data.pkl", "data.pkl", "byteorder", "0"))])
            data = archive({one: mutate(old, source) if one == inside else old for one, old in entries.items()})
        else:
            data = mutate(data, source)
        path = folder / name
        path.write_bytes(data)
        try:
            trace = Trace.open(folder)
            assert trace.index.height >= 0
            for record, shard in trace.index.select("record_id", "shard").rows():
                if shard is not None:
                    trace.tensor(record).sum()
            outcomes["read"] += 1
        except (TrimtabError, RuntimeError) as error:
            assert isinstance(error, TrimtabError) or "not implemented for" in str(error), repr(error)
            assert "\n" not in str(error) or not isinstance(error, TrimtabError), error
            outcomes["refused"] += 1
        path.unlink()
    return outcomes


def test_mutated_files(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path, 300)
    assert min(outcomes.values()) > 30, outcomes


@pytest.mark.full
def test_ten_thousand_mutated_files(tmp_path: Path) -> None:
    before = peak()
    outcomes = fuzz(tmp_path, 10_000)
    assert min(outcomes.values()) > 1000, outcomes
    assert peak() - before < 500 << 20


def test_the_key_in_the_index_is_json() -> None:
    from trimtab.trace.foreign._payload import decode_key, encode_key

    for key in ((), ("value",), ("a.b", 3, '\n"\u00e9')):
        assert tuple(decode_key(encode_key(key))) == key == tuple(json.loads(encode_key(key)))
