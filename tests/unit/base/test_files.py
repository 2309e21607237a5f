"""Whole files, safe names, and a lock that dies with its holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab._base.files import FileLock, atomic_write_bytes, safe_name
from trimtab.errors import InputError, TraceLockedError


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.json"
    atomic_write_bytes(target, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        atomic_write_bytes(tmp_path / "x", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


@given(st.text(max_size=40))
def test_a_safe_name_never_leaves_its_directory(name: str) -> None:
    try:
        safe = safe_name(name)
    except InputError:
        return
    folder = Path("/some/where")
    assert (folder / safe).parent == folder
    assert Path(safe).name == safe and not safe.startswith(".")


@pytest.mark.parametrize("name", ["", "..", "a/b", "../a", "a\\b", ".hidden", "a..b", "x" * 129, "a\0b"])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="begin with a letter or digit"):
        safe_name(name, "run id")


def test_a_second_holder_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    take = f"FileLock({str(path)!r}).acquire()"
    code = f"from trimtab._base.files import FileLock; {take}; print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdin is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TraceLockedError, match=f"process {holder.pid}"):
            FileLock(path).acquire()
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with FileLock(path):
        pass  # the dead holder holds nothing
    FileLock(path).acquire().release()
