"""Traces of commits against those of the commit before: rounding passes, bugs do not, LOW commits keep every bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.workflows.little_repository import LittleRepository, own_python  # noqa: F401 - a fixture
from trimtab.results.commits import CommitWalk
from trimtab.trace import TraceWriter
from trimtab.workflows.commits import commits

# The script copies a trace that is there already, so that no run has to load torch.
SCRIPT = """\
import os, shutil
shutil.copytree(f"{TRACES}/{NAME}", os.environ["TRIMTAB_DUMP"])
"""


@pytest.fixture
def repository(tmp_path: Path) -> LittleRepository:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(64, 128, generator=generator).bfloat16()
    one_ulp = (value.float() * (1 + 2.0**-8 * torch.randn(64, 128, generator=generator).sign())).bfloat16()
    made = {"plain": value, "rounded": one_ulp, "scaled": (value.float() * 1.045).bfloat16()}
    for name, tensor in made.items():
        with TraceWriter(tmp_path / "traces" / name, kind="dump") as writer:
            for step in range(2):
                writer.write("hidden", tensor, phase="fwd_bwd", step=step, layer=0)
                writer.write("loss", torch.tensor(2.0), phase="fwd_bwd", step=step)
    head = f'TRACES, NAME = "{tmp_path / "traces"}", "plain"\n'
    return LittleRepository(tmp_path / "repo", head + SCRIPT)


def use(repository: LittleRepository, name: str, more: str = "") -> str:
    text = (repository.path / "train.py").read_text()
    old = text.splitlines()[0].rpartition(", ")[2].split('"')[1]
    return repository.commit(f"Use {name}", **{"train.py": text.replace(f'"{old}"', f'"{name}"') + more})


def walk(repository: LittleRepository, **options: object) -> CommitWalk:
    given = {"repo": repository.path, "out": repository.path.parent / "walk", **options}
    command = None if "plan" in options else ["python", "train.py"]
    return commits(f"{repository.base}..HEAD", command, **given)  # type: ignore[arg-type]


def test_rounding_passes_and_a_scale_error_diverges(repository: LittleRepository) -> None:
    use(repository, "rounded")
    bad = use(repository, "scaled")
    use(repository, "scaled", "# the same, and a comment\n")
    result = walk(repository)
    assert [one.status for one in result.commits] == ["passed", "passed", "flagged", "passed"]
    assert result.first_bad == bad
    first, second, third = (one.trace_changes[0] for one in result.commits[1:])
    assert (first.pairs, first.identical, first.failing) == (4, 2, 0)
    assert not second.passed and second.failing == 2 and "hidden" in second.first
    assert result.commits[2].flags[0].kind == "diverged"
    assert third.identical == third.pairs == 4
    assert [len(one.trace_changes) for one in result.commits] == [0, 1, 1, 1]  # the last is LOW: asked twice, told once
    assert "trimtab triage" in result.next_command and "rounded" not in result.next_command
    assert result.commits[2].runs[0].trace in result.next_command
    good, bad = (result.commits[number].commit[:12] for number in (1, 2))
    assert f"--repo {result.repository} --revisions {good}..{bad}" in result.next_command


def test_a_low_risk_commit_keeps_every_bit(repository: LittleRepository) -> None:
    text = (repository.path / "train.py").read_text().splitlines()[0]
    script = f"# plain\n{text}\nNAME = open('train.py').readline().split()[1]\n{SCRIPT}"
    repository.base = repository.commit("Read", **{"train.py": script})
    repository.edit("A comment that is read", "# plain\n", "# rounded\n")
    result = walk(repository)
    (flag,) = result.commits[1].flags
    assert result.commits[1].risk == "LOW" and flag.kind == "changed"
    assert "2 of 4 tensors are not equal to the bit, first hidden" in flag.text
    (change,) = result.commits[1].trace_changes
    assert not change.passed and change.failing == 2 and change.reason in flag.text


def test_a_noise_run_replaces_the_rounding_model(repository: LittleRepository, tmp_path: Path) -> None:
    use(repository, "scaled")
    plan = tmp_path / "plan.yaml"
    noise = f"cp -r {tmp_path}/traces/scaled {{out}}/trace"
    plan.write_text(f"commands: [python train.py]\nnoise: ['{noise}']\n")
    result = walk(repository, plan=plan)
    assert result.passed, result.reason
    plan.write_text(f"commands: [python train.py]\nnoise: ['{noise.replace('scaled', 'plain')}']\n")
    result = walk(repository, plan=plan)
    assert not result.passed
    assert any("is bit-identical, so it shows no noise" in one for one in result.warnings)


def test_a_trace_that_vanishes_is_flagged(repository: LittleRepository) -> None:
    repository.commit("No dump", **{"train.py": "import json\nprint(json.dumps({'loss': 1.0}))\n"})
    result = walk(repository)
    assert [one.kind for one in result.commits[1].flags] == ["missing"]


def test_checks_of_traces(repository: LittleRepository, tmp_path: Path) -> None:
    use(repository, "rounded")
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "commands: [{name: a, run: python train.py}, {name: b, run: python train.py}]\n"
        "commits: [{commit: HEAD, checks: [{trace: true, command: a, equal: b}, "
        "{trace: true, command: a, like: base}, {trace: true, command: b, equal: base}]}]\n"
    )
    result = walk(repository, plan=plan)
    assert [(one.kind, one.command) for one in result.commits[1].flags] == [("check", "b")]


def test_bisect_compares_with_the_base(repository: LittleRepository) -> None:
    use(repository, "rounded")
    bad = use(repository, "scaled")
    use(repository, "scaled", "# more\n")
    use(repository, "scaled", "# and more\n")
    result = walk(repository, bisect=True)
    assert result.first_bad == bad
    assert result.commits[2].trace_changes[0].against == repository.base[:12]


def test_what_nobody_seeds_is_no_evidence(repository: LittleRepository, tmp_path: Path) -> None:
    """The traces of runs 0, 1, 2 ... hold another state of a random generator each."""
    for number in range(6):
        with TraceWriter(tmp_path / "traces" / f"run{number}", kind="dump") as writer:
            writer.write("hidden", torch.full((8, 8), 1.0 if number < 5 else 2.0), phase="fwd_bwd", step=0)
            writer.write("rng.[a]*", torch.arange(7) * (number + 1), phase="fwd_bwd", step=0)
    head = (repository.path / "train.py").read_text().splitlines()[0]
    count = f"count = len(os.listdir({str(tmp_path / 'seen')!r}))\nos.mkdir(f'{tmp_path}/seen/{{count}}')\n"
    (tmp_path / "seen").mkdir()
    script = f"{head}\nimport os\n{count}NAME = f'run{{count}}'\n{SCRIPT}"
    repository.base = repository.commit("Unseeded", **{"train.py": script})  # runs 0 and 1
    repository.edit("Comment", "import os\n", "import os  # a\n")  # 2
    repository.edit("Code", "import os  # a\n", "import os  # a\nx = 1\n")  # 3
    repository.edit("Another comment", "# a", "# b")  # 4
    bad = repository.edit("And a bad one", "x = 1", "x = 2")  # 5
    result = walk(repository, steps=1)
    assert [one.status for one in result.commits] == ["passed"] * 4 + ["flagged"], result.reason
    assert result.first_bad == bad and "first: hidden" in result.commits[4].flags[0].text
    assert any("rng.[a]*; these are not held against a commit" in one for one in result.warnings)


TRAIN = """\
import json, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(2):
    x = torch.randn(8, 16)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(json.dumps({"step": step, "loss": loss.item()}))
"""


def test_a_program_that_knows_nothing_of_the_dump_is_recorded(tmp_path: Path) -> None:
    repository = LittleRepository(tmp_path / "repo", TRAIN)
    bad = repository.edit("Scale the loss", "square().mean()", "square().mean() * 1.05")
    plan = tmp_path / "plan.yaml"
    plan.write_text("commands: [python train.py]\nnoise: []\nrules: [{trace: true, like: previous}]\n")
    result = walk(repository, plan=plan)
    assert result.first_bad == bad, result.reason
    change = result.commits[1].trace_changes[0]
    assert change.identical > 0 and change.failing > 0
    assert [one.kind for one in result.commits[1].flags] == ["diverged"]
