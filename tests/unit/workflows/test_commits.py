"""The walk over commits: real repositories, real worktrees, real processes."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.unit.workflows.little_repository import RUN, SCRIPT, LittleRepository, own_python  # noqa: F401 - a fixture
from trimtab.errors import InputError, RecipeError, TraceLockedError, UnfinishedError
from trimtab.results import from_json, to_json
from trimtab.results.commits import CommitWalk
from trimtab.workflows.commits import commits


@pytest.fixture
def repository(tmp_path: Path) -> LittleRepository:
    return LittleRepository(tmp_path / "repo")


def walk(repository: LittleRepository, **options: object) -> CommitWalk:
    given = {"repo": repository.path, "out": repository.path.parent / "walk", "steps": "LOW=3,MEDIUM=5,HIGH=12"}
    command = None if "plan" in options else RUN
    return commits(f"{repository.base}..HEAD", command, **{**given, **options})  # type: ignore[arg-type]


def plan_file(repository: LittleRepository, text: str) -> Path:
    path = repository.path.parent / "plan.yaml"
    path.write_text(text)
    return path


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody waits for stays as a zombie."""
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


class Pipe:
    """A named pipe that a command of a walk writes to; reading waits for it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def read(self) -> str:
        """What was written; an error after two minutes of nothing."""
        assert select.select([self._end], [], [], 120)[0], "the command did not come so far"
        text = os.read(self._end, 100).decode()
        os.close(self._end)
        return text


def kinds(result: CommitWalk, position: int) -> list[str]:
    return [one.kind for one in result.commits[position].flags]


def test_a_walk_finds_what_is_wrong_and_leaves_the_tree_alone(repository: LittleRepository) -> None:
    repository.edit("Say more", "import json, sys", "import json, sys  # plain")
    bad = repository.edit("Scale the loss", "SCALE = 1.0", "SCALE = float('nan')")
    (repository.path / "train.py").write_text("a dirty tree")
    (repository.path / "note.txt").write_text("untracked")
    repository.git("add", "note.txt")
    before = repository.state()
    result = walk(repository)
    assert repository.state() == before
    assert (repository.path / "train.py").read_text() == "a dirty tree"
    assert not result.passed and result.first_bad == bad
    assert [one.status for one in result.commits] == ["passed", "passed", "flagged"]
    assert [one.risk for one in result.commits[1:]] == ["LOW", "HIGH"]
    flag = result.commits[2].flags[0]
    assert (flag.kind, flag.metric, flag.step) == ("nonfinite", "loss", 0)
    assert result.ledger.expected == result.ledger.tested == 3
    assert not list((repository.path.parent / "walk").glob("worktrees"))
    assert from_json(CommitWalk, to_json(result)).reason == result.reason


def test_length_by_risk_and_comparison_at_equal_length(repository: LittleRepository) -> None:
    repository.edit("Comment", "import json, sys", "import json, sys  # a")
    repository.edit("Scale", "3.0 /", "3.1 /")
    result = walk(repository)
    low, high = result.commits[1:]
    assert (low.steps, high.steps) == (3, 12)
    assert [(one.metric, one.steps) for one in high.metric_changes] == [("grad_norm", 12), ("loss", 12)]
    assert {one.against for one in high.metric_changes} == {low.commit[:12]}
    assert high.metric_changes[1].max_abs == pytest.approx(0.1)
    assert high.status == "passed"


def test_a_low_risk_commit_that_moves_a_number_is_flagged(repository: LittleRepository) -> None:
    script = SCRIPT.replace("SCALE * (", "SCALE * noise * (").replace(
        "SCALE = 1.0", "from values import noise\nSCALE = 1.0"
    )
    repository.base = repository.commit("Noise", **{"train.py": script, "values.py": "noise = 1.0\n"})
    repository.commit("Add a note", **{"README.md": "read me"})
    # A rename that shadows: every name is consistent, and the number is not.
    plan = plan_file(
        repository,
        "commands: [{run: 'python train.py {steps} {seed}'}]\ncommits: [{commit: HEAD, risk: LOW}]\n",
    )
    repository.commit("Tidy", **{"values.py": "noise = 1.001\n"})
    result = walk(repository, plan=plan)
    assert kinds(result, 1) == []
    assert kinds(result, 2) == ["changed", "changed"]
    assert result.commits[2].risk_source == "plan"
    assert "two runs of the base differ by 0" in result.commits[2].flags[0].text


def test_a_command_that_fails_is_one_line_and_the_rest_goes_on(repository: LittleRepository) -> None:
    bad = repository.edit("Break", "SCALE = 1.0", "SCALE = 1.0 / 0")
    repository.edit("Mend", "SCALE = 1.0 / 0", "SCALE = 1.0")
    result = walk(repository)
    assert [one.status for one in result.commits] == ["passed", "failed", "passed"]
    assert result.first_bad == bad
    run = result.commits[1].runs[0]
    assert run.status == "failed" and run.exit_code == 1
    assert run.detail == "exit code 1: ZeroDivisionError: float division by zero"
    assert result.commits[2].metric_changes[0].against == repository.base[:12]


def test_the_time_limit_ends_the_whole_group(repository: LittleRepository, tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    repository.commit("Hang", **{"train.py": script})
    result = walk(repository, time_limit=1.0)
    run = result.commits[1].runs[0]
    assert run.status == "timeout" and run.detail == "over its time limit of 1 s"
    child = int((tmp_path / "child").read_text())
    assert gone(child)
    again = walk(repository, time_limit=1.0)
    assert again.ledger.kept == 2
    assert walk(repository, time_limit=2.0).commits[1].runs[0].detail == "over its time limit of 2 s"


def test_finished_runs_are_not_repeated_and_from_repeats_them(repository: LittleRepository, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"open({str(log)!r}, 'a').write('x')\n" + SCRIPT
    repository.base = repository.commit("Log", **{"train.py": script})
    repository.edit("One", "3.0 /", "3.1 /")
    second = repository.edit("Two", "3.1 /", "3.2 /")
    first = walk(repository)
    count = len(log.read_text())
    assert count == 4  # base, its repeat, two commits
    again = walk(repository)
    assert len(log.read_text()) == count and again.ledger.kept == 3
    assert [one.flags for one in again.commits] == [one.flags for one in first.commits]
    walk(repository, from_commit=second[:9])
    assert len(log.read_text()) == count + 1
    # After a rebase the earlier commits are the same ones, and only new ones run.
    repository.git("reset", "--quiet", "--hard", "HEAD~1")
    repository.edit("Two, mended", "3.1 /", "3.05 /")
    walk(repository)
    assert len(log.read_text()) == count + 2


def test_one_mistake_is_not_taken_for_many(repository: LittleRepository) -> None:
    bad = repository.edit("Scale", "SCALE = 1.0", "SCALE = 20.0")
    repository.edit("A kernel", "import json, sys", "import json, sys\nscale = 3")
    repository.edit("Worse", "SCALE = 20.0", "SCALE = float('nan')")
    result = walk(repository)
    assert [one.status for one in result.commits] == ["passed", "flagged", "flagged", "flagged"]
    assert result.commits[2].summary.startswith(f"as since {bad[:12]}: ")
    assert not result.commits[3].summary.startswith("as since")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_walk_resumes(repository: LittleRepository, tmp_path: Path, how: signal.Signals) -> None:
    log, pipe = tmp_path / "log", Pipe(tmp_path / "pipe")
    script = (
        f"import os, signal\nopen({str(log)!r}, 'a').write('x')\n"
        f"if COMMIT == 2 and os.path.exists({str(pipe.path)!r}):\n"
        f"    open({str(pipe.path)!r}, 'w').write('here')\n    signal.pause()\n" + SCRIPT
    )
    repository.base = repository.commit("Wait", **{"train.py": "COMMIT = 0\n" + script})
    for number in (1, 2, 3):
        repository.edit(f"Commit {number}", f"COMMIT = {number - 1}", f"COMMIT = {number}")
    code = (
        "import signal, sys; from trimtab.cli._call import guard; from trimtab.workflows.commits import commits\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever runs the tests may ignore it
        f"sys.exit(guard(lambda: int(not commits({repository.base + '..HEAD'!r}, {RUN!r}, "
        f"repo={str(repository.path)!r}, out={str(tmp_path / 'walk')!r}, steps=9).passed)))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert pipe.read() == "here" and len(log.read_text()) == 4  # base, its repeat, commit 1, and commit 2 that waits
    process.send_signal(how)
    error = process.communicate()[1]
    if how is signal.SIGINT:
        assert process.returncode == 3 and "interrupted; go on with the same command" in error
        assert not (tmp_path / "walk" / "worktrees").exists()
    before = repository.state()[:2]
    pipe.path.unlink()
    result = commits(f"{repository.base}..HEAD", RUN, repo=repository.path, out=tmp_path / "walk", steps=9)
    assert result.passed and result.ledger.kept == 2
    assert len(log.read_text()) == 6  # commit 2 once more, then commit 3
    assert repository.state()[:2] == before
    assert len(repository.git("worktree", "list").splitlines()) == 1


def test_what_a_killed_walk_left_running_is_ended(repository: LittleRepository, tmp_path: Path) -> None:
    pipe = Pipe(tmp_path / "pipe")
    script = (
        f"import os, signal\nif WAIT:\n    open({str(pipe.path)!r}, 'w').write(str(os.getpid()))\n    signal.pause()\n"
    )
    repository.base = repository.commit("Wait", **{"train.py": "WAIT = 0\n" + script + SCRIPT})
    repository.edit("Hang", "WAIT = 0", "WAIT = 1")
    code = (
        "from trimtab.workflows.commits import commits\n"
        f"commits({repository.base + '..HEAD'!r}, {RUN!r}, repo={str(repository.path)!r}, "
        f"out={str(tmp_path / 'walk')!r}, steps=9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    left = int(pipe.read())
    process.kill()
    process.wait()
    assert not gone(left)
    commits(f"{repository.base}..HEAD", RUN, repo=repository.path, out=tmp_path / "walk", steps=9, time_limit=0.5)
    assert gone(left)


@pytest.mark.parametrize("bad", [1, 4, 7])
def test_bisect_takes_log2_tests(repository: LittleRepository, bad: int) -> None:
    shas = [repository.base]
    for number in range(1, 8):
        old = repository.git("show", "HEAD:train.py").splitlines()[1]
        value = "float('inf')" if number >= bad else "1.0"
        new = f"SCALE = {value}  # {number}"
        shas.append(repository.edit(f"Commit {number}", old, new))
    result = walk(repository, bisect=True)
    assert result.first_bad == shas[bad]
    assert len(result.bisection) <= 2 + math.ceil(math.log2(7))
    assert sum(one.status != "untested" for one in result.commits) == len(result.bisection)
    assert result.ledger.tested + len(result.ledger.untested) == result.ledger.expected == 8


def test_bisect_goes_around_what_cannot_be_tested(repository: LittleRepository) -> None:
    repository.edit("One", "SCALE = 1.0", "SCALE = 1.0  # 1")
    repository.edit("Two", "SCALE = 1.0  # 1", "sys.exit(125)")
    bad = repository.edit("Three", "sys.exit(125)", "SCALE = float('inf')")
    repository.edit("Four", "float('inf')", "float('-inf')")
    result = walk(repository, bisect=True)
    assert result.first_bad == bad
    assert "could not be tested" in result.reason


def test_bisect_says_when_there_is_nothing_to_find(repository: LittleRepository) -> None:
    repository.edit("Fine", "SCALE = 1.0", "SCALE = 1.0  # fine")
    result = walk(repository, bisect=True)
    assert result.passed and "as good as the base" in result.reason
    assert len(result.bisection) == 2
    repository.base = repository.edit("Bad", "SCALE = 1.0", "SCALE = float('inf')")
    repository.edit("More", "import json, sys", "import json, sys  # more")
    result = walk(repository, bisect=True)
    assert not result.passed and result.reason.startswith("the base itself is bad")


def test_checks_expectations_setup_and_several_commands(repository: LittleRepository) -> None:
    repository.commit("Wider", **{"train.py": SCRIPT.replace("3.0 /", "9.0 /")})
    repository.commit("Broken on purpose", **{"train.py": "raise SystemExit('no such shape')\n"})
    plan = plan_file(
        repository,
        """
setup: test -f {worktree}/train.py && echo ready > {worktree}/ready.txt
seed: 3
steps: {LOW: 4, MEDIUM: 4, HIGH: 4}
commands:
  - {name: one, run: 'cat ready.txt && python train.py {steps} {seed} > {out}/metrics.jsonl'}
  - {name: two, run: 'python train.py {steps} {seed}'}
rules:
  - {metric: loss, max: 5, at: late}
  - {metric: loss, min: 0}
commits:
  - commit: HEAD~1
    intention: triple the loss
    checks:
      - {metric: loss, command: one, equal: two}
      - {metric: loss, like: base, within: 0.5}
      - {metric: perplexity, max: 1}
      - {metric: loss, max: 1, at: first}
    expect: [check, missing]
  - commit: HEAD
    expect: ['error: no such shape']
    notes: to be mended
""",
    )
    result = walk(repository, plan=plan, steps=None)
    wide, broken = result.commits[1:]
    assert wide.intention == "triple the loss" and broken.notes == "to be mended"
    texts = [one.text for one in wide.flags]
    assert [one.kind for one in wide.flags] == ["check", "check", "missing", "check", "check"]
    assert "away from" in texts[0] and "metrics: grad_norm, loss" in texts[2] and "above 1" in texts[3]
    assert all(one.excused for one in wide.flags) and wide.status == "passed"
    assert broken.status == "passed" and broken.flags[0].excused
    assert result.passed and result.reason.endswith("7 red flags as expected")
    assert result.commits[0].runs[0].seed == 3
    assert result.commits[0].runs[0].metrics[0].values[0] == pytest.approx(3.03)


def test_an_expected_failure_that_does_not_come_is_a_flag(repository: LittleRepository) -> None:
    repository.edit("Fine", "3.0 /", "3.1 /")
    plan = plan_file(
        repository, "commands: ['python train.py {steps} {seed}']\ncommits: [{commit: HEAD, expect: error}]\n"
    )
    result = walk(repository, plan=plan)
    assert kinds(result, 1) == ["expected"] and not result.passed


def test_a_setup_that_fails_is_said_once_for_its_commit(repository: LittleRepository) -> None:
    repository.commit("Add a requirement", **{"requirements.txt": "nothing"})
    result = walk(repository, setup="test ! -f requirements.txt")
    assert result.commits[0].status == "passed"
    run = result.commits[1].runs[0]
    assert run.status == "setup" and run.detail == "setup: exit code 1, nothing on standard error"


def test_the_worktree_s_own_package_is_imported(repository: LittleRepository) -> None:
    files = {
        "src/mypackage.py": "VALUE = 1\n",
        "train.py": "import json, mypackage\nprint(json.dumps({'v': mypackage.VALUE}))\n",
    }
    repository.base = repository.commit("Package", **files)
    repository.commit("Two", **{"src/mypackage.py": "VALUE = 2\n"})
    result = walk(repository)
    assert [one.runs[0].metrics[0].values for one in result.commits] == [(1.0,), (2.0,)]


def test_the_environment_of_a_command(repository: LittleRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    script = (
        "import os, json, pathlib, subprocess\n"
        "head = subprocess.check_output(['git', 'rev-parse', 'HEAD'], text=True).strip()\n"
        "keys = ('TRIMTAB_DUMP', 'PYTHONHASHSEED', 'GIT_DIR', 'EXTRA')\n"
        "pathlib.Path(os.environ['TRIMTAB_DUMP']).with_name('seen.json').write_text(json.dumps("
        "{'head': head} | {key: os.environ.get(key) for key in keys}))\n"
    )
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_INDEX_FILE")
    head = repository.commit("Show", **{"train.py": script})
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    plan = plan_file(repository, "seed: 7\ncommands: [{run: [python, train.py], env: {EXTRA: given}}]\n")
    result = walk(repository, plan=plan)
    place = repository.path.parent / "walk" / result.commits[1].runs[0].directory
    seen = json.loads((place / "out" / "seen.json").read_text())
    assert seen["head"] == head
    assert seen["TRIMTAB_DUMP"] == str(place / "out" / "trace")
    assert (seen["PYTHONHASHSEED"], seen["GIT_DIR"], seen["EXTRA"]) == ("7", None, "given")
    assert any("only its exit code was tested" in one for one in result.warnings)


def test_a_command_may_say_that_it_is_not_recorded(repository: LittleRepository) -> None:
    commands = 'commands: [{run: [python, train.py], name: plain, env: {TRIMTAB_DUMP: ""}}, {run: [python, train.py]}]'
    repository.commit("Show", **{"train.py": "import os\nassert not os.environ.get('TRIMTAB_DUMP')\n"})
    result = walk(repository, plan=plan_file(repository, f"seed: 7\n{commands}\n"))
    assert [one.status for one in result.commits[1].runs] == ["ok", "failed"]


def test_user_hooks_do_not_run(repository: LittleRepository, tmp_path: Path) -> None:
    hook = repository.path / ".git" / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/hooked\n")
    hook.chmod(0o755)
    repository.edit("Fine", "3.0 /", "3.1 /")
    assert walk(repository).passed
    assert not (tmp_path / "hooked").exists()


def test_plan_only_proposes_a_plan_that_can_be_used(repository: LittleRepository) -> None:
    bad = repository.edit("Scale: {loss}", "3.0 /", "300.0 /")
    result = walk(repository, plan_only=True)
    assert not result.passed and not result.finished and result.ledger.tested == 0
    text = Path(result.plan).read_text()
    assert f"commit: {bad[:12]}" in text and "# HIGH: train.py:5 " in text and "risk: HIGH" in text
    edited = text.replace("risk: HIGH", "risk: HIGH\n  intention: a hundred times")
    Path(result.plan).write_text(edited)
    with pytest.raises(RecipeError, match="was edited since it was proposed: use it with --plan"):
        walk(repository)
    used = walk(repository, plan=result.plan, steps=None)
    assert used.commits[1].intention == "a hundred times" and used.commits[1].steps == 12
    assert kinds(used, 1) == ["range", "range"]
    assert Path(result.plan).read_text() == edited


def test_nondeterminism_of_the_base_is_said_and_is_noise(repository: LittleRepository) -> None:
    script = SCRIPT.replace("import json, sys", "import json, sys, random").replace(
        "0.01 * seed", "0.1 * random.random()"
    )
    repository.base = repository.commit("Unseeded", **{"train.py": script})
    repository.commit("Note", **{"README.md": "x"})
    result = walk(repository, steps=40)
    assert any("is everything seeded" in one for one in result.warnings)
    assert result.passed


@pytest.mark.parametrize(
    ("revisions", "options", "message"),
    [
        ("HEAD", {}, "write BASE..HEAD"),
        ("HEAD...HEAD", {}, "write BASE..HEAD"),
        ("nonsense..HEAD", {}, "unknown revision 'nonsense'"),
        ("--all..HEAD", {}, "unknown revision '--all'"),
        ("HEAD..HEAD", {}, "holds no commit"),
        ("side..HEAD", {}, "is not an ancestor of"),
        (
            "HEAD..HEAD~1",
            {},
            r"of \w{12} but comes after it: use \w{12}\.\.\w{12}$",
        ),
        ("HEAD~1..HEAD", {"repo": "/"}, "is not inside a git repository"),
        ("HEAD~1..HEAD", {"repo": "/nowhere"}, "no directory '/nowhere'"),
        ("HEAD~1..HEAD", {"steps": "LOW"}, "lengths by risk such as"),
        ("HEAD~1..HEAD", {"steps": 0}, "at least 1 step"),
        ("HEAD~1..HEAD", {"time_limit": 0.0}, "a positive number of seconds"),
        ("HEAD~1..HEAD", {"from_commit": "side"}, "is not in the range"),
        ("HEAD~1..HEAD", {"plan": "p.yaml", "command": RUN}, "leave one out"),
        ("HEAD~1..HEAD", {"plan": "nowhere.yaml"}, "cannot be read"),
        ("HEAD~1..HEAD", {"command": "python train.py --s {step}"}, r"did you mean \{steps\}"),
    ],
)
def test_bad_input_is_one_line(
    repository: LittleRepository, revisions: str, options: dict[str, object], message: str
) -> None:
    repository.edit("More", "3.0 /", "3.1 /")
    repository.git("branch", "side")
    repository.git("reset", "--quiet", "--hard", "HEAD~1")
    repository.edit("Other", "3.0 /", "3.2 /")
    out = repository.path.parent / "walk"
    given = {"repo": repository.path, "out": out, **options}
    command = given.pop("command", None if "plan" in given else RUN)
    with pytest.raises(InputError, match=message) as caught:
        commits(revisions, command, **given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_merges_are_refused_or_followed(repository: LittleRepository) -> None:
    repository.git("checkout", "--quiet", "-b", "side")
    repository.edit("Side", "3.0 /", "3.5 /")
    repository.git("checkout", "--quiet", "main")
    repository.commit("Main", **{"note.md": "x"})
    repository.git("merge", "--quiet", "--no-edit", "side")
    with pytest.raises(InputError, match="is a merge commit, one of 1 in the range; add --first-parent"):
        walk(repository)
    result = walk(repository, first_parent=True)
    assert [one.risk for one in result.commits[1:]] == ["LOW", "HIGH"]


def test_one_walk_at_a_time_and_no_other_directory(repository: LittleRepository, tmp_path: Path) -> None:
    repository.edit("More", "3.0 /", "3.1 /")
    walk(repository, plan_only=True)
    from trimtab._base.files import FileLock

    with FileLock(tmp_path / "walk" / "lock"), pytest.raises(TraceLockedError, match="is being written by process"):
        walk(repository)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="exists and holds no walk"):
        walk(repository, out=tmp_path / "full")
    other = LittleRepository(tmp_path / "other")
    other.edit("More", "3.0 /", "3.1 /")
    with pytest.raises(InputError, match="holds a walk of"):
        walk(other, out=tmp_path / "walk")


def test_ctrl_c_inside_is_unfinished(repository: LittleRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.edit("More", "3.0 /", "3.1 /")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.workflows.commits._runs.run_command", stop)
    with pytest.raises(UnfinishedError, match="go on with the same command"):
        walk(repository)
    assert len(repository.git("worktree", "list").splitlines()) == 1
