"""`trimtab commits` drives trainings of autoencoders by the plan that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.workflows.little_repository import LittleRepository, own_python  # noqa: F401 - a fixture
from trimtab.cli import main

PLAN = Path(__file__).parents[2] / "examples" / "sae-commits.yaml"
LENGTH = "steps: {LOW: 2, MEDIUM: 20, HIGH: 200}"
SMALLER = {
    "testbed:2000 --site layers.4.mlp_out": "synthetic:64x16:4 $(cat settings.txt)",
    "--batch-size 1024 --buffer-rows 16384": "--batch-size 64 --buffer-rows 256 --held-out 64",
    LENGTH: "steps: {LOW: 3, MEDIUM: 3, HIGH: 3}\nnoise: []",
}
NAMES = {"jumprelu-bf16", "jumprelu-fp32", "topk"}


def test_the_plan_that_ships_passes_a_sound_trainer_and_flags_one_that_starts_without_active_latents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer's repository holds its settings; the commands, but for their sizes, and all rules are the plan's."""
    text = PLAN.read_text()
    for large, small in SMALLER.items():
        assert large in text
        text = text.replace(large, small)
    (tmp_path / "plan.yaml").write_text(text)
    repository = LittleRepository(tmp_path / "repo", script="")
    base = repository.commit("Settings", **{"settings.txt": "--lr 3e-4"})
    bad = repository.edit("Higher thresholds", "--lr 3e-4", "--lr 3e-4 --threshold 2", "settings.txt")
    words = ["commits", f"{base}..HEAD", "--repo", str(repository.path), "--plan", str(tmp_path / "plan.yaml")]
    assert main([*words, "--out", str(tmp_path / "walk"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    sound, flagged = found["commits"]
    assert (sound["status"], sound["flags"]) == ("passed", [])
    assert (flagged["status"], found["first_bad"]) == ("flagged", bad)
    assert {(one["command"], one["status"], one["exit_code"]) for one in sound["runs"] + flagged["runs"]} == {
        (name, "ok", 0) for name in NAMES
    }
    bounds = {(one["command"], one["metric"]) for one in flagged["flags"] if one["kind"] == "bound"}
    assert bounds == {(f"jumprelu-{dtype}", metric) for dtype in ("bf16", "fp32") for metric in ("l0_share", "recon")}
    runs = list((tmp_path / "walk").glob("runs/*/*/out/run/run.json"))
    assert len(runs) == 6
    for path in runs:
        run = json.loads(path.read_text())
        assert (run["kind"], run["steps"], run["total_steps"], run["stopped"]) == ("sae_run", 3, 2000, "early_exit")
    moved = {one["metric"]: one for one in flagged["metric_changes"] if one["command"] == "jumprelu-fp32"}
    assert moved["l0_share"]["steps"] == 3


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_plan_that_ships_passes_a_commit_that_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is, on the embedded model."""
    repository = LittleRepository(tmp_path / "repo", script="")
    repository.commit("Say more", **{"README.md": "a trainer"})
    words = ["commits", f"{repository.base}..HEAD", "--repo", str(repository.path), "--plan", str(PLAN)]
    assert main([*words, "--out", str(tmp_path / "walk"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["status"], one["flags"]) for one in found["commits"]] == [("passed", []), ("passed", [])]
