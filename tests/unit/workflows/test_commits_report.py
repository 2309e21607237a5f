"""A walk as JSON, text, page and command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import trimtab
from tests.unit.workflows.little_repository import RUN, LittleRepository
from trimtab.cli import main
from trimtab.report import _commits, render_html, render_text, report
from trimtab.results import Finding, from_json, schema, to_json
from trimtab.results.commits import CommitWalk
from trimtab.workflows.commits import commits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CommitWalk:
    place = tmp_path_factory.mktemp("walk")
    repository = LittleRepository(place / "repo")
    repository.edit("Comment <b>&", "import json, sys", "import json, sys  # a")
    repository.edit("Scale", "3.0 /", "3.3 /")
    repository.edit("Overflow", "SCALE = 1.0", "SCALE = 1e308 * (1 if len(sys.argv) else 1) * 9")
    repository.edit("Break", "import json, sys", "import json, sys, nothing")
    return commits(f"{repository.base}..HEAD", RUN, repo=repository.path, out=place / "out", steps=9)


def test_json_comes_back(made: CommitWalk) -> None:
    text = to_json(made)
    assert set(json.loads(text)) == set(schema(CommitWalk)["properties"])
    assert to_json(from_json(CommitWalk, text)) == text
    assert json.loads((Path(made.directory) / "result.json").read_text()) == json.loads(text)


def test_text_holds_the_answer_and_every_commit(made: CommitWalk) -> None:
    text = render_text(made)
    assert text.startswith("Not passed: the first of 2 bad commits is ")
    for one in made.commits:
        assert one.commit[:12] in text
    assert "red flag <- first bad" in text and "failed" in text and "loss is inf at step 0" in text
    assert "ModuleNotFoundError: No module named 'nothing'" in text
    assert "trace" not in text.split("Red flags")[0].split("Commits\n")[1]  # no column without content


def test_the_page_is_safe_and_holds_the_curves(made: CommitWalk, tmp_path: Path) -> None:
    page = render_html(made)
    assert "Comment &lt;b&gt;&amp;" in page and "<b>&" not in page
    assert 'class="curve first"' not in page  # it is infinite from its first step: crosses only
    assert page.count('class="cross"') == 18  # nine steps of two metrics
    assert page.count('class="curve base"') == 2
    assert page.count('class="risk HIGH"') >= 2
    assert len(page) < 200_000
    (tmp_path / "walk.json").write_text(to_json(made))
    report(tmp_path / "walk.json", tmp_path / "walk.html")
    assert (tmp_path / "walk.html").read_text() == page


def test_panels_use_a_log_axis_where_values_span_decades(made: CommitWalk) -> None:
    panels = {one.title: one for one in _commits.view(made).panels}
    assert set(panels) == {"loss", "grad_norm"} and not panels["loss"].log
    track = replace(made.commits[0].runs[0].metrics[0], steps=(0, 1), values=(1.0, 1e6))
    run = replace(made.commits[0].runs[0], metrics=(track,))
    wide = replace(made, commits=(replace(made.commits[0], runs=(run,)),))
    (panel,) = _commits.view(wide).panels
    assert panel.log and [label for _, label in panel.y_ticks] == ["1", "1,000", "1e6"]
    assert panel.curves[0].path == "M0.0 120.0L300.0 0.0"


def test_a_plan_alone_does_not_pass(tmp_path: Path) -> None:
    repository = LittleRepository(tmp_path / "repo")
    repository.edit("Scale", "3.0 /", "3.3 /")
    made = commits(f"{repository.base}..HEAD", repo=repository.path, out=tmp_path / "out")
    text = render_text(made)
    assert text.startswith("Not passed: nothing was run: a plan is proposed for 1 commit, 1 of HIGH risk")
    assert "HIGH: train.py:5 gradients: loss" in text
    assert "1 commit rated, none run" in render_html(made)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LittleRepository:
    repository = LittleRepository(tmp_path / "repo")
    repository.edit("More", "3.0 /", "3.1 /")
    monkeypatch.chdir(repository.path)
    return repository


def test_the_command_line(cli: LittleRepository, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["commits", "HEAD~1..HEAD", "--out", str(tmp_path / "out"), "--json", "--", *RUN]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and document["ledger"]["tested"] == 2
    cli.edit("Overflow", "SCALE = 1.0", "SCALE = float('inf')")
    html = tmp_path / "walk.html"
    assert main(["commits", "HEAD~2..HEAD", "--out", str(tmp_path / "out"), "--html", str(html), "--", *RUN]) == 1
    assert "is the first bad commit" in html.read_text()
    assert main(["commits", "HEAD~2..HEAD", "--out", str(tmp_path / "plan"), "--plan-only", "--", *RUN]) == 3
    capsys.readouterr()
    assert main(["commits", "nothing..HEAD", "--", *RUN]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trimtab: unknown revision 'nothing'") and error.count("\n") == 1
    assert not Path("runs").exists()


def test_argv_is_this_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["commits", "a..b", "--from", "c", "--bisect", "--steps", "LOW=2", "--setup", "make", "--print-python"]
    assert main([*words, "--", "python", "t.py", "--steps", "{steps}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "tt.commits('a..b', ['python', 't.py', '--steps', '{steps}'], out='runs/commits', setup='make', "
        "steps='LOW=2', from_commit='c', bisect=True)"
    )
    calls = []

    def record(*args: object, **kwargs: object) -> Finding:
        calls.append((args, kwargs))
        return Finding(name="commits", state="ok", detail="")

    monkeypatch.setitem(vars(trimtab), "commits", record)
    assert main(["commits", "a..b", "--plan", "p.yaml"]) == 0
    assert calls == [(("a..b",), {"out": Path("runs/commits"), "plan": Path("p.yaml")})]
