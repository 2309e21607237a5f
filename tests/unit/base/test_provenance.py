"""A manifest says where it came from and keeps no secret."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trimtab._base import jsonio, optional, provenance
from trimtab.errors import PrerequisiteError


def test_the_record_is_json_and_names_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_SOMETHING", "1")
    monkeypatch.setenv("TRIMTAB_ADMIN_KEY", "secret")
    monkeypatch.setenv("UNRELATED", "x")
    record = provenance.collect(seed=3)
    text = jsonio.dumps(record)
    assert record["seed"] == 3
    assert record["packages"]["torch"].startswith("2.")
    assert record["environment"]["TRIMTAB_SOMETHING"] == "1"
    assert "secret" not in text and "UNRELATED" not in text


def test_the_commit_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    monkeypatch.chdir(tmp_path)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert (provenance.collect()["git_commit"], provenance.collect()["git_dirty"]) == (head, False)
    (tmp_path / "file").write_text("2")
    assert provenance.collect()["git_dirty"] is True


def test_outside_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.collect()["git_commit"] is None


def test_a_missing_extra_gives_the_command() -> None:
    with pytest.raises(
        PrerequisiteError, match=r"GGUF files needs the package 'no_such_module'.*pip install 'trimtab\[gguf\]'"
    ):
        optional.require("no_such_module", extra="gguf", feature="reading GGUF files")
