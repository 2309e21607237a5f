"""Options of `trimtab compare`: the call that they stand for, and what the command then prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from trimtab.cli import main
from trimtab.trace import TraceWriter


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ("--noise c", "noise='c'"),
        ("--noise c d", "noise=['c', 'd']"),
        ("--noise c --noise d --jobs 2", "noise=['c', 'd'], jobs=2"),
        ("--dims 'h: b s h[tp]' --dims 'g: t' --reference-dims 'h: s b h'", None),
        ("--worst 7 --tolerances -j 3", "worst=7, tolerances=True, jobs=3"),
        ("--verdict rel_diff_bands", "verdict='rel_diff_bands'"),
    ],
)
def test_the_call(options: str, arguments: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "b", *shlex.split(options), "--print-python"]) == 0
    said = capsys.readouterr().out.split("\n\n")[1].strip()
    arguments = arguments or "dims=['h: b s h[tp]', 'g: t'], reference_dims=['h: s b h']"
    assert said == f"tt.compare('a', 'b', {arguments})"


def test_a_report_has_two_names(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    for option in ("--html", "--report"):
        assert main(["compare", "a", "b", option, "page.html", "--print-python"]) == 0
        calls.append(capsys.readouterr().out)
    assert calls[0] == calls[1] and "tt.report(tt.compare('a', 'b'), 'page.html')" in calls[0]


def test_three_noise_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "b", "--noise", "c", "d", "e"]) == 2
    assert "--noise takes one run, or two" in capsys.readouterr().err


def test_triage_takes_two_noise_runs_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["triage", "a", "b", "--noise", "c", "d", "--print-python"]) == 0
    assert "tt.triage('a', 'b', noise=['c', 'd'])" in capsys.readouterr().out


def test_lines_come_as_pairs_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for name, factor in (("a", 1.0), ("b", 1.1)):
        with TraceWriter(tmp_path / name, provenance={}) as writer:
            for tensor in ("g", "h"):
                writer.write(tensor, values * (factor if tensor == "h" else 1.0))
    command = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--jsonl", "--tolerances", "--worst", "2"]
    assert main(command) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["compared", "compared", "verdict"]
    record = lines[1]["record"]
    assert len(record["worst_elements"]) == len(record["worst_rows"]) == 2
    gap = (values * 1.1 - values).abs().double()
    assert record["tolerance"]["absolute"] == pytest.approx(float(gap.max()))
    assert record["tolerance"]["relative"] == pytest.approx(0.1, rel=1e-5)
    assert record["tolerance"]["both"] == pytest.approx(float((gap / (1 + values.abs())).max()))
