"""Every command that the skill names runs, and every key of the JSON that it relies on is there.

The reduced form reads each command with the parser of its verb, and each key in the schema of its result; the full one
runs the whole procedure on a repository with a planted mistake.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.workflows.little_repository import LittleRepository
from trimtab.cli import _COMMANDS, _GROUPS, main
from trimtab.results import Comparison, schema
from trimtab.results.commits import CommitWalk
from trimtab.results.triage import Triage

ROOT = Path(__file__).parents[2]
SKILL = (ROOT / "skills" / "debug-precision" / "SKILL.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", SKILL, re.DOTALL) for line in block.splitlines()]
CONTRACT = [
    (command, key)
    for command, keys in re.findall(r"^\| (\w+) \| ([^|]+) \|", SKILL, re.MULTILINE)
    for key in re.findall(r"`([\w.]+)`", keys)
]
# What a comparison that fails exits with; the lines of the skill are run as they stand.
FAILS = {"trimtab compare": 1, "trimtab triage": 1}

MODEL = """\
import torch


class Norm(torch.nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(16, 32), Norm(), torch.nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))
"""
TRAIN = """\
import json, random, torch
from model import Model

random.seed(0)
torch.manual_seed(0)
model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(2):
    loss = model(torch.randn(8, 16)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(json.dumps({"step": step, "loss": loss.item()}))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int, str]], str]:
    """The directory in which all commands were run, what each gave, and the bad commit."""
    repository = LittleRepository(tmp_path_factory.mktemp("skill") / "repo", TRAIN)
    repository.commit("Model", **{"model.py": MODEL, ".gitignore": "runs/\n__pycache__/\n"})
    repository.git("checkout", "--quiet", "-b", "change")
    repository.edit("Say what it is", "import torch\n", "import torch  # the model\n", "model.py")
    bad = repository.edit("Fuse the norm", "+ 1e-6)", "+ 1e-6) * 1.05", "model.py")
    repository.edit("Say more", "# the model", "# the whole model", "model.py")
    (repository.path / "runs").mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = []
    for line in COMMANDS:
        given = {**os.environ, "PATH": path}
        made = subprocess.run(["bash", "-c", line], cwd=repository.path, env=given, capture_output=True, text=True)
        ran.append((line, made.returncode, made.stderr))
    return repository.path, ran, bad


def test_the_skill_has_its_head_and_names_verbs_that_exist() -> None:
    head = re.match(r"---\nname: debug-precision\ndescription: (.{50,1024})\n---\n", SKILL)
    assert head is not None
    verbs = {*_COMMANDS, *_GROUPS}
    named = set(re.findall(r"trimtab ([a-z][\w-]*)", "\n".join(COMMANDS)))
    assert named <= verbs and {"dump", "compare", "triage", "commits"} <= named
    for title in ("Run", "Compare", "Investigate", "Full"):
        assert re.search(rf"^## \d\. {title}", SKILL, re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("trimtab ")])
def test_every_command_is_one(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(re.split(r" > | \|\| ", line)[0])[1:]
    at = words.index("--") if "--" in words else len(words)
    assert main([*words[:at], "--print-python", *words[at:]]) == 0
    assert capsys.readouterr().out.startswith("import trimtab")


@pytest.mark.parametrize(("command", "key"), CONTRACT)
def test_every_key_is_in_the_schema(command: str, key: str) -> None:
    from trimtab.dump import DumpRun

    classes = {"dump": DumpRun, "compare": Comparison, "triage": Triage, "commits": CommitWalk}
    document = schema(classes[command])
    place = document
    for part in key.split("."):
        for one in (place, *place.get("anyOf", ())):
            name = one.get("$ref", "").rpartition("/")[2]
            place = document["$defs"][name] if name else place
        assert part in place["properties"], f"{command}: no {key}"
        place = place["properties"][part]


@pytest.mark.full
def test_every_command_runs(done: tuple[Path, list[tuple[str, int, str]], str]) -> None:
    assert len(done[1]) == len(COMMANDS) >= 10
    for line, code, error in done[1]:
        expected = next((number for start, number in FAILS.items() if line.startswith(start)), 0)
        assert code == expected, f"{line}: exit code {code}: {error}"


@pytest.mark.full
@pytest.mark.parametrize(("command", "key"), CONTRACT)
def test_every_key_is_there(done: tuple[Path, list[tuple[str, int, str]], str], command: str, key: str) -> None:
    found: Any = document(done[0], command)
    for part in key.split("."):
        assert isinstance(found, Mapping) and part in found, f"{command}: no {key}"
        found = found[part]


@pytest.mark.full
def test_the_procedure_finds_the_planted_mistake(done: tuple[Path, list[tuple[str, int, str]], str]) -> None:
    place, _, bad = done
    assert document(place, "dump")["passed"] and not document(place, "compare")["passed"]
    triage = document(place, "triage")
    assert triage["divergence"]["module_path"] == "norm"
    assert triage["source"]["file"].endswith("model.py")
    walk = document(place, "commits")
    assert walk["first_bad"] == bad
    plan = json.loads((place / "runs" / "plan.json").read_text())
    assert not plan["finished"] and [one["risk"] for one in plan["commits"]] == ["LOW", "LOW", "HIGH", "LOW"]
    assert (place / "runs" / "triage.html").stat().st_size > 1000


def document(place: Path, command: str) -> Any:
    name = {"dump": "change", "commits": "walk"}.get(command, command)
    return json.loads((place / "runs" / f"{name}.json").read_text())
