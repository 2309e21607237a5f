"""`trimtab sae train` as it is called: exit codes, one document, lines, signals, one line for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.results import from_json
from trimtab.results.sae import SAERun, SAEStepLine

SMALL = ["--batch-size", "64", "--buffer-rows", "256", "--held-out", "128", "--d-sae", "48", "--warmup", "2"]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["sae", "train", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_one_document_with_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "synthetic:32x16:3", "--out", tmp_path, "--steps", 4, "--json", *SMALL)
    assert code == 0
    found = from_json(SAERun, out)
    assert (found.steps, found.saes[0].d_sae) == (4, 48)
    again = run(capsys, "synthetic:32x16:3", "--out", tmp_path, "--steps", 4, "--json", *SMALL)
    assert again[:2] == (0, out)  # read, not repeated


def test_a_document_a_line_with_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "synthetic:32x16:3", "--out", tmp_path, "--steps", 4, "--jsonl", *SMALL)
    assert code == 0
    assert [from_json(SAEStepLine, line).step for line in out.splitlines()] == [1, 2, 3, 4]
    assert out == (tmp_path / "sae" / "steps.jsonl").read_text()


def test_every_option_of_a_training_reaches_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--dtype fp32 --lower-dtype fp16 --adam-trick --optimizer rmsprop --sparsity-coeff 0.002 --target-l0 9 "
        "--early-exit 3 --seed 5 --deterministic --log-timing --log-every 2 --eval-every 2 --skip-initial-eval "
        "--steps 20 --keep-last 1 --save-every 2 --jsonl"
    )
    code, out, _ = run(capsys, "synthetic:32x16:3", "--out", tmp_path, *words.split(), *SMALL)
    assert code == 0
    found = from_json(SAERun, (tmp_path / "run.json").read_text())
    assert [json.loads(line)["step"] for line in out.splitlines()] == [2, 3]
    assert all("step" in json.loads(line)["seconds"] for line in out.splitlines())
    made = found.saes[0]
    assert (found.steps, found.total_steps, found.deterministic, made.dtype, made.compute) == (
        3,
        20,
        True,
        "fp32",
        "fp16",
    )
    assert [one.step for one in made.checks] == [2, 3]
    assert (made.config["optim"]["optimizer"], made.config["optim"]["target_l0"]) == ("rmsprop", 9.0)
    assert (made.config["config"]["sparsity_coefficient"], made.config["seed"]) == (0.002, 5)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_red_flag_in_a_strict_run_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n  - {name: high, metric: recon, max: 1.0e-6, level: flag, text: too high}\n")
    words = ["synthetic:32x16:3", "--steps", 4, "--monitor", file, *SMALL]
    code, out, _ = run(capsys, *words, "--out", tmp_path / "strict", "--strict")
    assert code == 1
    assert "not passed: stopped at step 1" in out
    code, out, _ = run(capsys, *words, "--out", tmp_path / "told")
    assert code == 0
    assert "flag: sae step 1: high" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("synthetic --lower-dtype fp16", "add adam_trick"),
        ("synthetic --dtype bf16 --lower-dtype fp32", "one of fp32/fp32, fp32/bf16, fp32/fp16, bf16/bf16, fp16/fp16"),
        ("synthetic --dtype int8", "dtype"),
        ("synthetic --target-l0 49", "at most d_sae = 48 latents can be active"),
        ("synthetic --early-exit 9 --steps 4", "early_exit is 9; 1 to 4"),
        ("nothing.jsonl --site layers.1.mlp_out", "nothing.jsonl: no such file"),
        ("testbed:4 --site layers.99.mlp_out", "layers.99"),
        ("testbed:4", "no site was given"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run(capsys, *words.split(), "--out", tmp_path / "o", *SMALL)
    assert (code, out) == (2, "")
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_sigterm_saves_exits_with_3_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A process of its own, told to stop as soon as its first line is there."""
    words = [
        *(sys.executable, "-m", "trimtab", "sae", "train", "synthetic:32x16:3", "--out", str(tmp_path / "a")),
        *("--steps", "100000", "--early-exit", "99999", "--jsonl", "--log-every", "5", *SMALL),
    ]
    running = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert running.stdout is not None
    first = running.stdout.readline()
    running.send_signal(signal.SIGTERM)
    out, error = running.communicate(timeout=60)
    assert running.returncode == 3
    steps = [json.loads(line)["step"] for line in (first + out).splitlines()]
    assert "SIGTERM received after" in error and "the same call goes on from there" in error
    kept = sorted((tmp_path / "a" / "checkpoints").iterdir())
    saved = int(kept[-1].stem.partition("-")[2])
    assert steps[-1] <= saved < steps[-1] + 5
    del words[words.index("--early-exit") + 1]
    words.insert(words.index("--early-exit") + 1, str(saved + 5))
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    first_step = json.loads(done.stdout.splitlines()[0])["step"]
    assert saved < first_step <= saved + 5


def test_the_plan_that_ships_is_one_for_commits_and_its_commands_are_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from trimtab.workflows.commits.plan import read_plan

    plan = read_plan(Path(__file__).parents[3] / "examples" / "sae-commits.yaml")
    for command in plan.commands:
        words = command.fill({"steps": 50, "seed": 1, "out": "o", "worktree": "w"})[-1].split()
        assert words[:3] == ["trimtab", "sae", "train"]
        assert main([*words[1:], "--print-python"]) == 0
        assert "early_exit=50" in capsys.readouterr().out
    asked = {(one.metric, one.min, one.max) for one in plan.rules}
    assert {("recon", None, 0.27), ("grad_norm", 1e-8, 1e2)} <= asked
