"""Scoring a run: what is counted, what is missing, what the files hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pytest

from trimtab import testbed
from trimtab.backends import Backend
from trimtab.errors import InputError, SteeringError
from trimtab.evaluate import TestbedScorer, load, rollouts, score
from trimtab.evaluate.scorers import Mark, Output, projections, vector_classifier
from trimtab.results import from_json, to_json
from trimtab.results.evaluation import Evaluation
from trimtab.sites import Site
from trimtab.steering import SteeringVector
from trimtab.testing.models import tiny, tiny_tokenizer


@dataclass
class Scripted:
    """A scorer that remembers what it saw."""

    marks: list[Mark] = field(default_factory=list)
    seen: list[Output] = field(default_factory=list)
    name: str = "scripted"

    def score(self, outputs: Sequence[Output]) -> list[Mark]:
        self.seen += outputs
        return [self.marks[index % len(self.marks)] for index in range(len(outputs))]


@pytest.fixture(scope="module")
def run(model: Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "animal"
    rollouts(
        model,
        testbed.prompts(6),
        vectors={"animal": "testbed:animal"},
        scales=[-1.0, 1.0],
        prompted="the fox",
        samples=3,
        temperature=1.0,
        max_tokens=16,
        out=out,
    )
    return out


def test_steering_with_the_right_direction_shows(model: Backend, run: Path) -> None:
    result = score(run, ["testbed:animal", "testbed:gloomy:share"], model=model, retention=testbed.prompts(2, seed=5))
    means = {(one.variant, one.scorer): one for one in result.summaries}
    up, down = means["animal@+1", "testbed:animal"], means["animal@-1", "testbed:animal"]
    assert up.mean > down.mean + 0.2 and up.count == 18 and up.low < up.mean < up.high
    dose = next(one for one in result.dose_responses if one.scorer == "testbed:animal")
    assert dose.group == "animal" and dose.slope_low > 0 and dose.spearman > 0.2
    assert [point.scale for point in dose.points] == [-1.0, 0.0, 1.0] and dose.n == 54
    damage = {one.variant: one for one in result.effects}
    assert damage["unsteered"].perplexity_ratio == 1.0 and damage["unsteered"].kl == pytest.approx(0.0, abs=1e-9)
    assert damage["animal@+1"].kl > 0.01 and damage["animal@+1"].retention > 1.0
    assert math.isnan(damage["prompted"].kl) and not math.isnan(damage["prompted"].perplexity)
    assert {one.variant for one in result.pareto} == {one.name for one in load(run).variants}
    assert {one.group for one in result.split_half} == {"animal"}


def test_the_files_hold_what_the_result_says(model: Backend, run: Path) -> None:
    result = score(run, ["testbed:animal:share"], model=model)
    assert to_json(from_json(Evaluation, (run / "summary.json").read_text())) == to_json(result)
    assert json.loads((run / "summary.json").read_text())["kind"] == "evaluation"
    scores = pl.read_parquet(run / "scores.parquet")
    assert scores.height == 4 * 6 * 3
    for one in result.summaries:
        part = scores.filter(variant=one.variant, scorer=one.scorer)
        assert part["value"].count() == one.count and one.count + one.missing + one.refusals == 18
        assert part["value"].mean() == pytest.approx(one.mean)
        assert part["value"].std() == pytest.approx(one.std)
    questions = pl.read_parquet(run / "per_question.parquet")
    assert questions.height == 4 * 6 and set(questions["question"]) == set(testbed.prompts(6))
    assert questions["count"].sum() == sum(one.count for one in result.summaries)
    outputs = pl.read_parquet(run / "effects.parquet")
    assert outputs.height == 72 and outputs["perplexity"].min() > 1.0  # type: ignore[operator]


def test_scorers_are_blind_and_see_the_continuation_alone(model: Backend, run: Path) -> None:
    scorer = Scripted(marks=[Mark(value=1.0)])
    score(run, [scorer], effects=False, model=model)
    assert {one.question for one in scorer.seen} <= set(testbed.prompts(6))  # without the variant's system prompt
    assert len(scorer.seen) == len(set(scorer.seen))  # each different output once
    assert not {"variant", "steering", "system", "scale"} & set(Output.__dataclass_fields__)
    base = {row.prompt: row.prompt_ids for row in load(run).rows() if row.variant == "unsteered"}
    assert {one.prompt_ids for one in scorer.seen} == set(base.values())


def test_refusals_and_missing_values_are_counted_and_never_zeros(model: Backend, run: Path) -> None:
    marks = [
        Mark(value=0.5),
        Mark(value=None, refusal=True),
        Mark(value=None, reason="garbled"),
        Mark(value=math.nan),
        Mark(value=0.5),
    ]
    result = score(run, [Scripted(marks=marks)], effects=False, model=model)
    for one in result.summaries:
        assert one.mean == 0.5 and one.std in (0.0, pytest.approx(0.0))
        assert one.count + one.refusals + one.missing == 18
    assert sum(one.refusals for one in result.summaries) >= 8
    assert any("garbled" in reason for one in result.summaries for reason in one.reasons)
    assert any("the scorer gave nan" in reason for one in result.summaries for reason in one.reasons)
    assert result.passed and result.finished
    silent = score(run, [Scripted(marks=[Mark(value=None, reason="late", retry=True)])], effects=False, model=model)
    assert not silent.passed and not silent.finished and math.isnan(silent.summaries[0].mean)
    assert silent.dose_responses == silent.split_half == ()
    assert "score again" in silent.warnings[0]


def test_the_testbed_s_scorer_is_exact() -> None:
    outputs = [
        Output(question="", text="the fox slept . the lamp fell ."),
        Output(question="", text="the lamp fell ."),
        Output(question="", text="the"),
    ]
    assert [one.value for one in TestbedScorer(attribute="animal", contrast=False).score(outputs)] == [0.5, 0.0, None]
    contrast = TestbedScorer(attribute="animal").score(outputs)
    assert [one.value for one in contrast] == [0.5 - 0.5 / 4, -0.25, 0.0]
    assert [one.value for one in TestbedScorer(attribute="cheerful").score(outputs)] == [0.0, 0.0, 0.0]
    with pytest.raises(InputError, match="no attribute 'fish'"):
        TestbedScorer(attribute="fish")


def test_the_vector_as_a_classifier(model: Backend) -> None:
    pairs = testbed.contrast("animal", 16, seed=77)
    texts, labels = [*pairs.positive, *pairs.negative], [True] * 16 + [False] * 16
    found = vector_classifier(model, "testbed:animal", texts, labels, [*range(16)] * 2)
    assert found.auc > 0.8 and found.questions == 8 and found.held_out == found.train == 16
    other = vector_classifier(model, "random:3", texts, labels, [*range(16)] * 2, site="layers.3.resid_post")
    assert other.auc < found.auc
    whole = projections(model, "testbed:animal", texts[:1])
    ids = model.encode(texts[0]).ids
    parts = projections(model, "testbed:animal", [ids] * len(ids[:-1]), skip=range(len(ids) - 1))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5) and parts[3] != pytest.approx(whole[0], rel=1e-3)
    with pytest.raises(InputError, match="no token left"):
        projections(model, "testbed:animal", [ids], skip=[len(ids)])
    with pytest.raises(InputError, match="does not say its site"):
        projections(model, "random:3", texts[:1])


def test_a_vector_of_another_model_scores_nothing(model: Backend) -> None:
    foreign = SteeringVector.of([1.0] * 128, site=Site("resid_post", 3), model_digest="xxh3:full:0123")
    with pytest.raises(SteeringError, match="was made on a model of digest xxh3:full:0123"):
        projections(model, foreign, ["the fox"])


def test_an_unfinished_run_is_scored_as_far_as_it_goes(model: Backend, run: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    for file in ("rollouts.json", "steering"):
        (part / file).symlink_to(run / file)
    (part / "rollouts.jsonl").write_text("\n".join((run / "rollouts.jsonl").read_text().splitlines()[:30]) + "\n")
    result = score(part, ["testbed:animal"], model=model)
    assert not result.finished and "30 of 72 outputs" in result.warnings[0] and result.count == 30


def test_bad_input(model: Backend, run: Path, tmp_path: Path) -> None:
    for scorers in ([], ["testbed"], ["testbed:fish"], ["testbed:animal:all"], ["minilm"], ["testbed:animal"] * 2):
        with pytest.raises(InputError):
            score(run, scorers, model=model)
    with pytest.raises(InputError, match="at least 1"):
        score(run, ["testbed:animal"], budget=0.5, model=model)
    with pytest.raises(InputError, match="needs the name of its model"):
        score(run, ["judge"], model=model)
    with pytest.raises(InputError, match="unknown setting 'modle'"):
        score(run, ["judge"], judge={"modle": "x"}, model=model)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in ("rollouts.json", "steering"):
        (damaged / file).symlink_to(run / file)
    (damaged / "rollouts.jsonl").write_text('{"variant": 1}\n')
    with pytest.raises(InputError, match="line 1 is damaged"):
        score(damaged, ["testbed:animal"], model=model)


def test_another_model_is_refused(run: Path) -> None:
    from trimtab.backends import open_backend

    other = open_backend("hf", tiny("qwen3"), tokenizer=tiny_tokenizer())
    with pytest.raises(InputError, match="give the same model"):
        score(run, ["testbed:animal"], model=other)
    other.close()


def test_an_engine_that_records_no_logits_has_no_kl_and_says_so(
    model: Backend, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.errors import SiteError
    from trimtab.evaluate import effects

    def refuse(*_: object) -> None:
        raise SiteError("this engine does not record logits")

    monkeypatch.setattr(effects, "drift", refuse)
    result = score(run, ["testbed:animal"], model=model)
    assert all(math.isnan(one.kl) and one.perplexity > 1 for one in result.effects)
    assert result.warnings == ("the KL was not measured: this engine does not record logits",)
