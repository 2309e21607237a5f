"""--jsonl: one versioned document per line, made as soon as there is something to say, and nothing else."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from tests.unit.workflows.little_repository import RUN, LittleRepository, own_python  # noqa: F401 - a fixture
from trimtab.backends.mock import MockBackend
from trimtab.cli import main
from trimtab.results import AnalyzedLine, CommitLine, ComparedLine, GeneratedLine, VerdictLine, from_json

KINDS: dict[str, type[Any]] = {
    "generated": GeneratedLine,
    "compared": ComparedLine,
    "analyzed": AnalyzedLine,
    "commit": CommitLine,
    "verdict": VerdictLine,
}


def parse(text: str) -> list[Any]:
    """Read lines, each against the schema of its kind."""
    assert text.endswith("\n")
    return [from_json(KINDS[json.loads(line)["kind"]], line) for line in text[:-1].split("\n")]


def test_each_generation_is_a_line_that_left_before_the_next_batch_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, seen, pipe = MockBackend.generate, [], io.BytesIO()

    def generate(backend: MockBackend, requests: Any, **options: Any) -> Any:
        seen.append(pipe.getvalue().decode())
        return real(backend, requests, **options)

    monkeypatch.setattr(MockBackend, "generate", generate)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(pipe))  # holds text back until it is flushed
    command = f"generate a b c d e -m any --backend mock --batch-size 2 --max-tokens 3 --out {tmp_path / 'run'} --jsonl"
    assert main(shlex.split(command)) == 0
    seen.append(pipe.getvalue().decode())
    assert [text.count("\n") for text in seen] == [0, 2, 4, 5]
    lines = parse(seen[-1])
    assert [line.prompt_index for line in lines] == [0, 1, 2, 3, 4]
    whole = tt.generate("any", list("abcde"), backend="mock", batch_size=2, max_tokens=3)
    assert tuple(line.generated for line in lines) == whole.texts
    assert {(line.model, line.backend, line.dtype, line.trace) for line in lines} == {
        ("any", "mock", "float32", str(tmp_path / "run"))
    }
    assert tt.Trace.open(tmp_path / "run").tokens["prompt"].n_unique() == 5
    assert tt.rerun(tmp_path / "run", out=tmp_path / "again").texts == whole.texts


def test_what_is_refused_prints_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = "generate a b -m any --backend mock --batch-size 1 --max-tokens 2 --jsonl --vector random:0 --layer 0"
    assert main(shlex.split(command + " --add 1 --where 1:2")) == 0
    assert len(parse(capsys.readouterr().out)) == 2
    assert main(shlex.split(command + " --add 1 --where 90:")) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1


def test_a_comparison_is_a_line_per_pair_and_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steering in (("a", None), ("b", tt.Steer(vector="random:0", layer=0, add=2.0))):
        tt.capture(
            "any", ["ab", "c"], sites="layers.*.resid_post", out=tmp_path / name, backend="mock", max_tokens=2,
            steering=steering,
        )  # fmt: skip
    for other, code in (("a", 0), ("b", 1)):
        assert main(["compare", str(tmp_path / "a"), str(tmp_path / other), "--jsonl"]) == code
        *pairs, verdict = parse(capsys.readouterr().out)
        result = tt.compare(tmp_path / "a", tmp_path / other)
        assert tuple(pair.record.key for pair in pairs) == tuple(one.key for one in result.records)
        assert [pair.record.status for pair in pairs] == [one.status for one in result.records]
        assert (verdict.passed, verdict.reason, verdict.ledger) == (code == 0, result.reason, result.ledger)


def test_an_analysis_is_a_line_per_configuration_and_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tt.sweep(
        "any", ["ab", "c"], backend="mock", reference="mock_float32", configs=["bf16", "float32"], max_tokens=2,
        out=tmp_path, run_id="r", steering=tt.Steer(vector="random:0", layer=0, cap=0.0),
    )  # fmt: skip
    assert main(["analyze", run.path, "--jsonl"]) == 0
    *found, verdict = parse(capsys.readouterr().out)
    analysis = tt.analyze(run.path)
    assert [(one.config, one.prompt.index) for one in found] == [
        (config.label, index) for config in analysis.configs for index in (0, 1)
    ]
    for name in ("drift", "cap_steps", "logprobs"):
        assert sorted(map(repr, sum((getattr(one, name) for one in found), ()))) == sorted(
            map(repr, getattr(analysis, name))
        )
    assert [one.agreement for one in found if one.agreement] == list(analysis.agreements)
    assert [one.agreement is None for one in found] == [one.config == one.reference for one in found]
    assert (verdict.of, verdict.passed, verdict.ledger) == ("analysis", True, analysis.ledger)


def test_one_document_and_many_are_not_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--json", "--jsonl"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main(["doctor", "--jsonl"]) == 2
    assert "--jsonl" in capsys.readouterr().err


def test_a_walk_over_commits_is_a_line_per_commit_and_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = LittleRepository(tmp_path / "repo")
    repository.edit("Fine", "SCALE = 1.0", "SCALE = 1.0  # fine")
    bad = repository.edit("Bad", "SCALE = 1.0", "SCALE = float('nan')")
    command = ["commits", f"{repository.base}..HEAD", "--repo", str(repository.path), "--out", str(tmp_path / "walk")]
    assert main([*command, "--jsonl", "--", *RUN]) == 1
    *told, verdict = parse(capsys.readouterr().out)
    assert [line.outcome.status for line in told] == ["passed", "passed", "flagged"]
    assert told[2].outcome.commit == bad and {line.revisions for line in told} == {f"{repository.base}..HEAD"}
    assert verdict.of == "commits" and not verdict.passed and verdict.ledger.tested == 3
    assert bad[:12] in verdict.reason
    assert main([*command[:-1], str(tmp_path / "plan"), "--plan-only", "--jsonl"]) == 3
    *told, verdict = parse(capsys.readouterr().out)
    assert [line.outcome.status for line in told] == ["untested"] * 3 and not verdict.passed
