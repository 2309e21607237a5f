"""Every command and example of the README runs as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", " ").splitlines() if line.strip()
]
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def test_the_trimtab_commands_run_in_their_order(tmp_path: Path) -> None:
    lines = [line for line in COMMANDS if words(line)[0] == "trimtab"]
    assert len(lines) >= 5
    for line in lines:
        done = subprocess.run(words(line), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        # 1 is a verdict ("compared, and different"); anything above is a failure
        assert done.returncode in (0, 1), f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 10_000


def test_the_python_example_runs(tmp_path: Path) -> None:
    programs = [text for kind, text in BLOCKS if kind == "python"]
    assert len(programs) == 1
    done = subprocess.run(
        [sys.executable, "-c", programs[0]], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "compare.html").is_file()
    statements = [line for line in programs[0].splitlines() if line.strip()]
    assert len(statements) <= 11


@pytest.mark.parametrize("line", [line for line in COMMANDS if words(line)[0] == "make"])
def test_make_knows_its_targets(line: str) -> None:
    done = subprocess.run([*words(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [line for line in COMMANDS if words(line)[0] == "pip"])
def test_the_installation_resolves(line: str) -> None:
    """Without the network: what is asked for is what this environment already has."""
    command = [sys.executable, "-m", *words(line), "--dry-run", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"the README links to {target}, which does not exist"


def test_every_verb_is_in_the_readme() -> None:
    from trimtab.cli import _COMMANDS, _GROUPS

    for verb in (*_COMMANDS, *_GROUPS):
        assert f"trimtab {verb}" in README, f"the README does not name `trimtab {verb}`"
