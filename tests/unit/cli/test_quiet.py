"""--quiet: no progress on standard error, also where somebody looks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import trimtab as tt
from trimtab.cli import main


@pytest.mark.parametrize("quiet", [False, True])
def test_a_quiet_command_shows_no_progress(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    command = ["generate", "one", "-m", "any", "--backend", "mock", "--max-tokens", "3", "--json"]
    assert main(command + ["--quiet"] * quiet) == 0
    said = capsys.readouterr()
    assert ("any (float32)" in said.err) is not quiet
    assert said.out.startswith("{")


def test_lines_reach_standard_output_while_progress_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar takes standard error alone: what is written meanwhile may be on its way to a file."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["generate", "one", "-m", "any", "--backend", "mock", "--max-tokens", "3", "--jsonl"]) == 0
    said = capsys.readouterr()
    assert '"kind":"generated"' in said.out.replace(" ", "")
    assert "generated" not in said.err


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_comparison_counts_its_pairs(
    jobs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, steer in (("a", None), ("b", tt.Steer(vector="random:0", layer=0, add=2.0))):
        tt.capture("any", "one", sites="layers.*.resid_post", out=tmp_path / name, backend="mock", steering=steer)
    pairs = len(tt.compare(tmp_path / "a", tmp_path / "b").records)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--jobs", jobs, "--json"]) == 1
    assert f"{pairs}/{pairs}" in capsys.readouterr().err
