"""LLM judges over real HTTP: exact, late, garbled, refusing, dying midway, and out of reach."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluate.scripted_judge import ScriptedJudge, scripted_judge
from trimtab import testbed
from trimtab.backends import Backend
from trimtab.errors import BackendError, InputError
from trimtab.evaluate import Judge, JudgeConfig, rollouts, score
from trimtab.evaluate.scorers import Output
from trimtab.evaluate.scorers.judge import RUBRIC, fill, read_verdict

pytest.importorskip("tenacity")
pytest.importorskip("diskcache")

OUTPUTS = [Output(question=f"question {number}", text=f"answer {number}") for number in range(12)]


def config(judge: ScriptedJudge | None = None, **options: Any) -> JudgeConfig:
    url = "http://127.0.0.1:9/v1" if judge is None else judge.url
    usual = {"base_url": url, "requests_per_second": 1e4, "backoff": 0.001, "timeout": 20.0, "workers": 4}
    return JudgeConfig(**{"model": "scripted", **usual, **options})


def number_of(request: dict[str, Any]) -> int:
    """Return the number of the answer that is judged."""
    return int(request["messages"][0]["content"].split("Answer:\nanswer ")[1].split("\n")[0])


def test_exact_answers_come_back_in_order() -> None:
    with scripted_judge(lambda _, request: str(number_of(request) * 5)) as judge:
        marks = Judge(config(judge, workers=1)).score(OUTPUTS)
    assert [mark.value for mark in marks] == [5.0 * number for number in range(12)]
    first = judge.asked[0]
    assert first["model"] == "scripted" and first["temperature"] == 0.0 and len(first["messages"]) == 1
    order = [number_of(request) for request in judge.asked]
    assert sorted(order) == list(range(12)) and order != list(range(12))  # an order of its own: blind to the variants


def test_refusals_are_no_zeros() -> None:
    with scripted_judge(lambda _, request: "REFUSAL" if number_of(request) % 2 else "80") as judge:
        marks = Judge(config(judge)).score(OUTPUTS)
    assert [mark.refusal for mark in marks] == [bool(number % 2) for number in range(12)]
    assert {mark.value for mark in marks if not mark.refusal} == {80.0}
    assert not any(mark.retry for mark in marks)


def test_repeated_judgements_are_averaged_and_are_asked_apart() -> None:
    with scripted_judge(lambda _, request: str(40 + 10 * request["seed"])) as judge:
        marks = Judge(config(judge, repeats=3, temperature=1.0)).score(OUTPUTS[:2])
    assert [mark.value for mark in marks] == [50.0, 50.0] and len(judge.asked) == 6


def test_garbled_answers_are_asked_again_and_then_missing() -> None:
    def answer(number: int, request: dict[str, Any]) -> str | bytes:
        if number_of(request) == 3:
            return ["Between 20 and 80.", "", "one hundred", "250"][number % 4]
        return b"not json at all" if number < 3 else "7"

    with scripted_judge(answer) as judge:
        marks = Judge(config(judge, workers=1)).score(OUTPUTS)
    assert [mark.value for mark in marks] == [None if number == 3 else 7.0 for number in range(12)]
    assert (marks[3].retry and "cannot be read" in marks[3].reason) or "not one of a chat" in marks[3].reason


def test_busy_and_failing_servers_are_asked_again() -> None:
    script = {0: 429, 1: 500, 2: 503, 3: None}
    with scripted_judge(lambda number, _: script.get(number, "66")) as judge:
        marks = Judge(config(judge, workers=1, attempts=5)).score(OUTPUTS[:3])
    assert [mark.value for mark in marks] == [66.0] * 3 and len(judge.asked) == 7


def test_late_answers_count_as_missing_and_nobody_waits_for_ever() -> None:
    with scripted_judge(lambda *_: "50") as judge:
        judge.late.set()
        marks = Judge(config(judge, timeout=0.05, attempts=2)).score(OUTPUTS)
        assert all(mark.value is None and mark.retry for mark in marks)
        assert any("no answer within 0.05 s" in mark.reason for mark in marks)
        assert any("not asked" in mark.reason for mark in marks)
        assert len(judge.asked) < 2 * len(OUTPUTS)


def test_a_judge_that_is_out_of_reach_or_refuses_everything() -> None:
    marks = Judge(config(attempts=1)).score(OUTPUTS[:2])
    assert all("cannot be reached" in mark.reason for mark in marks)
    for status in (401, 404, 400):
        with (
            scripted_judge(lambda *_, status=status: status) as judge,
            pytest.raises(BackendError, match=f"refuses requests .{status}.*OPENAI_API_KEY"),
        ):
            Judge(config(judge)).score(OUTPUTS)


def test_a_judge_that_dies_midway_is_taken_up_where_it_stopped(model: Backend, tmp_path: Path) -> None:
    run = rollouts(
        model, testbed.prompts(5), vectors={"animal": "testbed:animal"}, scales=[1.0], max_tokens=6, out=tmp_path / "r"
    )
    settings: dict[str, Any] = {
        "model": "scripted", "requests_per_second": 1e4, "backoff": 0.001, "workers": 1, "attempts": 1
    }  # fmt: skip
    with scripted_judge(lambda number, _: "90" if number < 4 else None) as dying:
        cut = score(run.path, ["judge"], effects=False, judge=settings | {"base_url": dying.url}, model=model)
        different = len({(row.question, row.text) for row in _outputs(run.path)})
        assert not cut.finished and cut.passed and "score again" in cut.warnings[0]
        assert sum(one.missing for one in cut.summaries) > 0
        reasons = " ".join(reason for one in cut.summaries for reason in one.reasons)
        assert "hung up" in reasons or "chat completion" in reasons
        before = len(dying.asked)
        dying.answer = lambda *_: "10"
        whole = score(run.path, ["judge"], effects=False, judge=settings | {"base_url": dying.url}, model=model)
        assert whole.finished and sum(one.missing for one in whole.summaries) == 0
        assert len(dying.asked) - before == different - 4  # the four answers that came were kept
        values = sum(one.mean * one.count for one in whole.summaries)
        assert values >= 4 * 90
    assert all("animal@" not in text and "steer" not in text for text in dying.prompts())


def _outputs(path: str) -> list[Output]:
    from trimtab.evaluate import load
    from trimtab.evaluate.variants import question

    files = load(path)
    return [Output(question=question(files.plan.prompts[row.prompt]), text=row.text) for row in files.rows()]


def test_the_rate_is_kept() -> None:
    with scripted_judge(lambda *_: "1") as judge:
        began = time.perf_counter()
        Judge(config(judge, requests_per_second=100.0)).score(OUTPUTS)
        assert time.perf_counter() - began >= 11 / 100  # a lower bound: twelve requests, ten milliseconds apart


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("85", 85.0),
        ("Score: 85/100.", 85.0),
        ("  85 % ", 85.0),
        ("<think>maybe 20? no, 30</think>\n40", 40.0),
        ("REFUSAL", "refusal"),
        ("**REFUSAL** - it declines", "refusal"),
        ("I would say 20, perhaps 80", None),
        ("101", None),
        ("-5", None),
        ("v1.2.3", None),
        ("no refusal here", None),
        ("", None),
    ],
)
def test_reading_a_number(reply: str, value: float | str | None) -> None:
    verdict = read_verdict(reply, config())
    assert (None if verdict is None else "refusal" if verdict.value is None else verdict.value) == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"score": 3, "why": "5 reasons"}', 3.0),
        ('Here:\n```json\n{"score": 0.5}\n```', 0.5),
        ('{"refusal": true}', "refusal"),
        ('{"score": "REFUSAL"}', "refusal"),
        ('{"score": true}', None),
        ('{"score": 11}', None),
        ('{"points": 3}', None),
        ("[3]", None),
        ("3", None),
    ],
)
def test_reading_json(reply: str, value: float | str | None) -> None:
    verdict = read_verdict(reply, config(form="json", low=0, high=10))
    assert (None if verdict is None else "refusal" if verdict.value is None else verdict.value) == value


def test_braces_in_a_text_mean_nothing() -> None:
    text = fill(RUBRIC, Output(question="{answer} {x}", text="{question} {"))
    assert "Question:\n{answer} {x}\n" in text and "Answer:\n{question} {\n" in text


def test_settings_that_make_no_sense() -> None:
    for options in (
        {"rubric": "how good?"},
        {"repeats": 3},
        {"workers": 0},
        {"requests_per_second": 0.0},
        {"low": 5.0, "high": 5.0},
    ):
        with pytest.raises(InputError, match="judge"):
            config(**options)
