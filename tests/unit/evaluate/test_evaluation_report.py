"""An evaluation as JSON, text, page and command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab import testbed
from trimtab.backends import Backend
from trimtab.cli import main
from trimtab.evaluate import load, rollouts, score
from trimtab.report import _evaluation, render_html, render_text, report
from trimtab.results import from_json, schema, to_json
from trimtab.results.evaluation import Evaluation


@pytest.fixture(scope="module")
def made(model: Backend, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    out = tmp_path_factory.mktemp("evaluation") / "r"
    rollouts(
        model,
        testbed.prompts(6),
        vectors={"<b>animal": "testbed:animal"},
        scales=[-1.0, 1.0],
        controls=2,
        samples=2,
        temperature=1.0,
        max_tokens=16,
        out=out,
    )
    return score(out, ["testbed:animal", "testbed:animal:share"], model=model)


def test_json_comes_back(made: Evaluation) -> None:
    text = to_json(made)
    assert set(json.loads(text)) == set(schema(Evaluation)["properties"])
    assert to_json(from_json(Evaluation, text)) == text


def test_text_and_page_hold_the_answer(made: Evaluation, tmp_path: Path) -> None:
    text, page = render_text(made), render_html(made)
    assert text.startswith("<b>animal steers: testbed:animal rises with its strength")
    assert "&lt;b&gt;animal steers" in page and "<b>animal" not in page
    for words in ("Does it steer?", "More than chance?", "Which strength?", "At what cost?"):
        assert words in text and words in page
    assert page.count('class="band"') == 2 and page.count('class="line"') == 2 * 3  # controls have no band
    assert "random-1@-1" in text and len(page) < 200_000
    (tmp_path / "e.json").write_text(to_json(made))
    report(tmp_path / "e.json", tmp_path / "e.html")
    assert (tmp_path / "e.html").read_text() == page


def test_no_effect_is_not_called_one(made: Evaluation) -> None:
    flat = replace(made.dose_responses[0], slope=0.1, slope_low=-0.2, slope_high=0.3)
    view = _evaluation.view(replace(made, dose_responses=(flat,)))
    assert view.headline == "<b>animal does not measurably move testbed:animal"
    assert view.answers[0][1] == "Not measurably" and view.answers[0][3] == "bad"
    steep = replace(made.dose_responses[0], group="random-0", slope=-9.0)
    chance = _evaluation.view(replace(made, dose_responses=(made.dose_responses[0], steep)))
    assert chance.answers[1][1] == "No"
    learned = replace(steep, group="random-0@norm", slope=99.0)  # per hidden unit: another axis
    assert _evaluation.view(replace(made, dose_responses=(made.dose_responses[0], learned))).answers[1][1] != "No"
    bare = _evaluation.view(replace(made, dose_responses=(), pareto=(), split_half=()))
    assert bare.headline.startswith("No vector ran") and bare.answers == ()
    none = replace(made.split_half[0], chosen=math.nan)
    assert _evaluation.view(replace(made, split_half=(none,))).answers[-1][1] == "None"
    render_html(replace(made, dose_responses=(), pareto=(), split_half=(), effects=()))


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (
            "evaluate rollouts 'a b' --vector testbed:animal --vector x=random:1 --layer 2 --scale=-0.5 --scale 1 "
            "--unit matched_norm --learned animal --controls 2 --samples 3 --temperature 1.0 --backend vllm --out r",
            "trimtab.evaluate.rollouts('testbed', ['a b'], out='r', vectors={'animal': 'testbed:animal', "
            "'x': 'random:1'}, scales=[-0.5, 1.0], unit='matched_norm', learned='animal', controls=2, layer=2, "
            "samples=3, temperature=1.0, backend='vllm')",
        ),
        (
            "evaluate score r -s testbed:animal -s judge --judge model=m --judge repeats=2 --no-effects --html e.html",
            "tt.report(trimtab.evaluate.score('r', ['testbed:animal', 'judge'], effects=False, "
            "judge={'model': 'm', 'repeats': 2}), 'e.html')",
        ),
    ],
)
def test_argv_stands_for_one_call(argv: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    assert main([*shlex.split(argv), "--print-python"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == wanted


def test_the_commands_work_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(testbed.prompts(2)))
    run, page = tmp_path / "r", tmp_path / "e.html"
    asked = ["--vector", "testbed:animal", "--scale", "0.5", "--max-tokens", "6", "--out", str(run), "--json"]
    assert main(["evaluate", "rollouts", "--prompt-file", str(prompts), *asked]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is True
    assert main(["evaluate", "score", str(run), "-s", "testbed:animal", "--html", str(page), "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["kind"] == "evaluation" and str(page) in found.err and page.exists()
    assert main(["evaluate", "score", str(tmp_path), "-s", "testbed:animal"]) == 2
    assert main(["evaluate", "score", str(run), "-s", "judge", "--judge", "model"]) == 2
    assert "write KEY=VALUE" in capsys.readouterr().err


def test_a_vector_that_ran_only_as_learned_is_judged_at_that_norm(made: Evaluation) -> None:
    dose = replace(made.dose_responses[0], group="kind@norm")
    chance = replace(dose, group="random-0@norm", slope=dose.slope / 2)
    split = replace(made.split_half[0], group="kind@norm", chosen=12.2373)
    cost = replace(made.effects[1], variant="kind@learned", perplexity_ratio=1.25)
    view = _evaluation.view(replace(made, dose_responses=(dose, chance), split_half=(split,), effects=(cost,)))
    assert view.headline == "kind steers: testbed:animal rises with its strength"
    assert [short for _, short, _, _ in view.answers] == ["Yes", "Yes", "+12.2", "x 1.25"]


def test_the_page_shows_what_was_written(made: Evaluation) -> None:
    """The first output of each variant to two prompts, as it is in the run; of the random directions, the first."""
    rows = {(row.variant, row.prompt): row.text for row in load(made.path).rows() if row.sample == 0}
    names = ["unsteered", "<b>animal@-1", "<b>animal@+1", "random-0@-1", "random-0@+1"]
    shown = _evaluation.view(made).examples
    assert shown == tuple(
        (prompt, tuple((name, rows[name, place]) for name in names))
        for place, prompt in enumerate(testbed.prompts(6)[:2])
    )
    page, text = render_html(made), render_text(made, width=400)
    assert all(one in page for _, texts in shown for _, one in texts) and "<b>animal" not in page
    assert all(one in text for _, one in shown[0][1])
    assert {one.variant for one in made.examples} == {row.variant for row in load(made.path).rows()}
    assert 'id="outputs"' not in render_html(replace(made, examples=()))
