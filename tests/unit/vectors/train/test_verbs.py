"""`trimtab vectors train` and `sweep-lr`: argv makes exactly the call that --print-python shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.cli import main

SITE = "layers.3.resid_post"


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (
            f"train testbed:animal -s {SITE} --learning-rate 1 --out runs/v",
            f"trimtab.vectors.train('testbed', 'testbed:animal', out='runs/v', sites=['{SITE}'], learning_rate=1.0)",
        ),
        (
            f"train rows.jsonl --sites {SITE} --sites layers.4.mlp_out --no-packing --loss bipo --dtype bfloat16",
            f"trimtab.vectors.train('testbed', 'rows.jsonl', dtype='bfloat16', sites=['{SITE}', 'layers.4.mlp_out'], "
            "loss='bipo', packing=False)",
        ),
        (
            f"train --all sets -s {SITE} --ray auto --workers 2 --select score>=75 -m gpt2",
            f"tt.train_all('sets', 'gpt2', select='score>=75', ray='auto', workers=2, sites=['{SITE}'])",
        ),
        (
            f"sweep-lr testbed:animal -s {SITE} --rates 0.1 0.3",
            f"trimtab.vectors.sweep_lr('testbed', 'testbed:animal', rates=[0.1, 0.3], sites=['{SITE}'])",
        ),
    ],
)
def test_a_command_stands_for_one_call(command: str, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vectors", *command.split(), "--print-python"]) == 0
    assert capsys.readouterr().out.strip().endswith(program)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"train -s {SITE}", "give data, or --all with a folder"),
        (f"train a.jsonl --all sets -s {SITE}", "not both"),
        (f"train a.jsonl -s {SITE} --dry-run", "--dry-run belongs to --all FOLDER"),
        ("train testbed:animal", "--sites requires an argument"),
        (f"train testbed:animal -s {SITE} --epochs 0", "epochs is 0; at least 1 was expected"),
        ("train testbed:animal -s layers.9.resid_post", "layers 0 to 5"),
        (f"train none.jsonl -s {SITE}", "none.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_line(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vectors", *command.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_training_prints_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "testbed:animal", "-s", SITE, "--max-steps", "2", "--out", str(tmp_path / "v"), "--json"]
    assert main(["vectors", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "training" and len(found["steps"]) == 2 and found["stopped"] == "max_steps"
    assert main(["vectors", *words[:-1]]) == 0  # read, not repeated
    assert "step" in capsys.readouterr().out
