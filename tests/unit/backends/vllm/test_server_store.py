"""The directory of a server: what is read from it, what is written to it, and what never is."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.backends.vllm.server.naming import Term
from trimtab.backends.vllm.server.refusal import Refusal
from trimtab.backends.vllm.server.store import Store, read_upload
from trimtab.errors import InputError
from trimtab.steering import Add, Steering

ONE, TWO = (Steering({"layers.1.resid_post": [Add([1.0, 2.0], scale=scale)]}) for scale in (1.0, 2.0))
HOSTILE = (
    "../x",
    "..",
    ".",
    "",
    ".hidden",
    "a/b",
    "/etc/x",
    "a\\b",
    "a\x00",
    "C:x",
    "x" * 65,
    "sha",
    "\u2024\u2024",
    "a\n",
)


def test_a_directory_is_read_whole_and_followed(tmp_path: Path) -> None:
    ONE.save(tmp_path / "one.safetensors")
    (tmp_path / "notes.txt").write_text("not a steering")
    store = Store(tmp_path)
    assert [one.name for one in store.listed()] == ["one"]
    stored = store.put("two", TWO)
    assert stored.nbytes == (tmp_path / "two.safetensors").stat().st_size
    assert Store(tmp_path).get("two").steering == TWO
    assert store.find(Term(TWO.digest[:16], True, 1.0)).name == "two"
    store.remove("two")
    assert not (tmp_path / "two.safetensors").exists()
    for term in (Term("two", False, 1.0), Term(TWO.digest, True, 1.0)):
        with pytest.raises(Refusal) as caught:
            store.find(term)
        assert (caught.value.status, caught.value.reason) == (400, "unknown_name")


def test_a_digest_that_two_names_share_names_one_steering(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("a", ONE)
    store.put("b", ONE)
    assert store.find(Term(ONE.digest, True, 1.0)).steering == ONE


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_touch_nothing(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    ONE.save(tmp_path / "x.safetensors")
    store = Store(inside)
    for act in (lambda: store.put(name, TWO), lambda: store.remove(name), lambda: store.get(name)):
        with pytest.raises(Refusal) as caught:
            act()
        assert caught.value.reason == "bad_name"
    assert Steering.load(tmp_path / "x.safetensors") == ONE
    assert list(inside.iterdir()) == []


def test_a_link_in_the_directory_is_replaced_and_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.safetensors"
    inside.mkdir()
    ONE.save(outside)
    (inside / "link.safetensors").symlink_to(outside)
    store = Store(inside)
    store.put("link", TWO)
    assert Steering.load(outside) == ONE
    (inside / "link.safetensors").unlink()
    (inside / "link.safetensors").symlink_to(outside)
    store.remove("link")
    assert outside.exists()


def test_a_start_refuses_what_it_cannot_read_and_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        Store(tmp_path / "nowhere")
    for name in ("bad", "white space", "sha"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(b"no steering") if name == "bad" else ONE.save(path)
        with pytest.raises(InputError, match=f"{name}.safetensors"):
            Store(tmp_path)
        path.unlink()


class Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_an_upload_is_never_unpickled(tmp_path: Path) -> None:
    marker, file = tmp_path / "unpickled", tmp_path / "trap.pt"
    torch.save(Trap(marker), file)
    for data in (pickle.dumps(Trap(marker)), file.read_bytes()):
        with pytest.raises(Refusal) as caught:
            read_upload(data, "trap")
        assert caught.value.reason == "bad_file"
        assert "does not begin with the header of a safetensors file" in str(caught.value)
        assert "codec" not in str(caught.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))  # the trap would have worked
    assert marker.exists()


def _with_header(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        _with_header(b"[" * 100_000),
        _with_header(b'{"__metadata__": {"format": "\xff"}}'),
        _with_header(b'{"__metadata__": []}'),
        _with_header(b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}', b"\0" * 4),
        safetensors.torch.save({"direction": torch.ones(2)}),
        safetensors.torch.save({"d": torch.ones(2)}, {"format": "trimtab-steering", "version": "1"}),
        safetensors.torch.save(
            {}, {"format": "trimtab-steering", "version": "1", "steering": "[" * 9999, "digest": "0"}
        ),
    ],
)
def test_uploads_that_are_no_steering_are_refused(data: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        read_upload(data, "bad")
    assert caught.value.reason == "bad_file"
    json.dumps(caught.value.document())


@given(st.data())
def test_damaged_files_are_refused_or_still_the_same(data: st.DataObject) -> None:
    whole = bytearray(ONE.dumps())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        made = read_upload(bytes(whole), "damaged")
    except Refusal:
        return
    assert made == ONE
