"""Scalars of a run, courses over time, and the rules about them."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest

from trimtab.errors import PrerequisiteError, RecipeError
from trimtab.workflows.commits import _course, _metrics
from trimtab.workflows.commits._metrics import read_metrics, thinned
from trimtab.workflows.commits.plan import Check, read_plan


def lines(*documents: object) -> str:
    return "".join(json.dumps(one) + "\n" for one in documents)


def test_json_lines_printed_and_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "trace").mkdir()
    (tmp_path / "stdout").write_text(
        "loading\n"
        + lines({"step": 3, "loss": 2.5, "note": "text", "flag": True, "nested": {"acc": 1}})
        + '{"step": 4, "loss": NaN}\n{"step": 5, "loss": "-inf"}\n{"broken": \n[1]\n{"tokens": 7}\n{"tokens": 8}\n'
        + '{"huge": 1'
        + "0" * 400
        + "}\n"
        + '{"global_step": 9, "loss": 1}\n'
    )
    (out / "logs" / "m.jsonl").write_text(lines({"iter": 2, "grad_norm": 0.5}))
    (out / "trace" / "m.jsonl").write_text(lines({"step": 0, "inner": 1.0}))
    found = read_metrics(tmp_path / "stdout", out, "**/*.jsonl")
    assert set(found) == {"loss", "nested/acc", "tokens", "huge", "grad_norm"}
    assert found["loss"][0] == (3, 2.5) and math.isnan(found["loss"][1][1])
    assert found["loss"][2:] == [(5, -math.inf), (9, 1.0)]
    assert found["tokens"] == [(0, 7.0), (1, 8.0)]
    assert found["huge"] == [(0, math.inf)]
    assert found["grad_norm"] == [(2, 0.5)] and found["nested/acc"] == [(3, 1.0)]


def events(folder: Path, *points: tuple[str, int, float], as_tensor: bool = False) -> None:
    """Write TensorBoard events with its own writer."""
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.scalar.metadata import create_summary_metadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = EventFileWriter(str(folder))
    for tag, step, value in points:
        if as_tensor:
            metadata = create_summary_metadata("", "")
            one = Summary.Value(tag=tag, tensor=make_tensor_proto(value, dtype=float), metadata=metadata)
        else:
            one = Summary.Value(tag=tag, simple_value=value)
        writer.add_event(Event(wall_time=1.0, step=step, summary=Summary(value=[one])))
    writer.close()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_tensorboard_events(tmp_path: Path, as_tensor: bool) -> None:
    points = [("train/loss", step, 1.0 / (step + 1)) for step in range(12000)]
    events(tmp_path / "runs", *points, ("train/loss", 5, math.nan), as_tensor=as_tensor)
    found = read_metrics(tmp_path / "none", tmp_path, "**/*.jsonl")
    assert list(found) == ["train/loss"]
    assert len(found["train/loss"]) == 12001  # nothing sampled, and a step that comes again is kept
    assert found["train/loss"][3] == (3, 0.25)
    assert found["train/loss"][-1][0] == 5 and math.isnan(found["train/loss"][-1][1])


def test_folders_of_events_are_told_apart(tmp_path: Path) -> None:
    events(tmp_path / "a", ("loss", 0, 1.0))
    events(tmp_path / "b", ("loss", 0, 2.0))
    assert read_metrics(tmp_path / "none", tmp_path, "*") == {"a/loss": [(0, 1.0)], "b/loss": [(0, 2.0)]}


def test_events_without_their_reader_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")

    def missing(name: str, *, extra: str, feature: str) -> None:
        raise PrerequisiteError(f"{feature} needs {name}: pip install 'trimtab[{extra}]'")

    monkeypatch.setattr(_metrics, "require", missing)
    with pytest.raises(PrerequisiteError, match=re.escape("trimtab[tensorboard]")):
        read_metrics(tmp_path / "none", tmp_path, "*")


def test_thinning_keeps_what_matters() -> None:
    points = [(step, math.sin(step)) for step in range(5000)]
    points[1234] = (1234, 99.0)
    points[2345] = (2345, math.nan)
    few = thinned(points)
    assert len(few) <= _metrics.MAX_POINTS
    assert few[0] == points[0] and few[-1] == points[-1]
    assert (1234, 99.0) in few and 2345 in [step for step, _ in few]


DECAY = [3 / (1 + step / 5) for step in range(40)]
COURSES = {
    "rise-then-fall": [2 - step / 40 + 3 * math.exp(-(((step - 25) / 4) ** 2)) for step in range(40)],
    "fall-then-rise": [step / 40 - 3 * math.exp(-(((step - 25) / 4) ** 2)) for step in range(40)],
    "rising": [1 + step / 10 for step in range(40)],
    "spike": [9.0 if step == 20 else value for step, value in enumerate(DECAY)],
    "flat": [2.5] * 40,
}


@pytest.mark.parametrize("pattern", list(COURSES))
def test_a_course_is_seen_with_noise_and_not_in_a_healthy_one(pattern: str) -> None:
    generator = random.Random(0)
    size = 0.0 if pattern == "flat" else 0.02
    shown = [(step, value + generator.gauss(0, size)) for step, value in enumerate(COURSES[pattern])]
    found = _course.find(pattern, shown)  # type: ignore[arg-type]
    assert found is not None
    if pattern in ("rise-then-fall", "fall-then-rise", "spike"):
        assert abs(found[0] - (20 if pattern == "spike" else 25)) <= 2
    healthy = [(step, value + generator.gauss(0, 0.02)) for step, value in enumerate(DECAY)]
    assert _course.find(pattern, healthy) is None  # type: ignore[arg-type]
    assert _course.find(pattern, shown[:7]) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["rise-then-fall", "fall-then-rise", "rising", "spike"])
def test_noise_alone_is_no_course(pattern: str) -> None:
    generator = random.Random(1)
    alarms = 0
    for _ in range(200):
        level = generator.choice([0.0, 1.0, 10.0])
        noise = [(step, level + generator.gauss(0, 1)) for step in range(generator.randrange(8, 200))]
        alarms += _course.find(pattern, noise) is not None  # type: ignore[arg-type]
    assert alarms <= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("comands: [x]", "unknown field 'comands'; did you mean 'commands'"),
        ("commands: [{run: x, nane: y}]", r"commands\[0\]: unknown field 'nane'; did you mean 'name'"),
        ("commands: [{run: x}]\nrules: [{metric: loss, maximum: 3}]", r"rules\[0\]: unknown field 'maximum'"),
        (
            "commands: [{run: x}]\ncommits: [{commit: HEAD, checks: [{metric: a, mn: 1}]}]",
            r"checks\[0\]: unknown field",
        ),
        ("commands: [{run: x}]\nrules: [{metric: loss, max: high}]", "rules.0.max: .* got 'high'"),
        ("commands: [{run: x}]\nrules: [{metric: loss}]", "the check of 'loss' asks nothing"),
        ("commands: [{run: x}]\nrules: [{metric: loss, trace: true, like: base}]", "one of them"),
        ("commands: [{run: x}]\nrules: [{trace: true, max: 1}]", "takes `equal` or `like`"),
        ("commands: [{run: x}]\nrules: [{metric: loss, like: other}]", "'other' is not base, previous or a command"),
        ("commands: [{run: x}]\nrules: [{metric: loss, pattern: wild}]", "rules.0.pattern"),
        ("commands: [{run: x}]\nrules: [{metric: loss, factor: 0.5}]", "factor is 0.5"),
        ("commands: [{run: x}, {run: y}]", "the command name 'run' is there twice"),
        ("commands: [{run: x, name: ../a}]", "use 1 to 128 of"),
        ("commands: [{run: x, name: base}]", "has a meaning of its own"),
        ("commands: [{run: ''}]", "has nothing to run"),
        ("commands: [{run: 'x {sed}'}]", r"holds \{sed\}; did you mean \{seed\}"),
        ("commands: [x]\nnoise: [{run: y, name: z}]", "noise 'z' names no command"),
        ("commands: [x]\nsteps: {LOW: 0, MEDIUM: 1, HIGH: 1}", "at least 1 step for every risk"),
        ("commands: [x]\nsteps: {low: 3}", "steps"),
        ("commands: [x]\ncommits: [{commit: HEAD, expect: explosion}]", "no such red flag; kinds: error"),
        ("commands: [x]\ncommits: [{commit: HEAD, expect: ['error: (']}]", "not a regular expression"),
        ("commands: [x]\ncommits: [{commit: HEAD, risk: WILD}]", "commits.0.risk"),
        ("commands: [x]\ncommits: [{commit: HEAD, steps: 0}]", "steps is 0"),
        ("format_version: 99", "format version 99"),
    ],
)
def test_a_bad_plan_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises((RecipeError, ValueError), match=message) as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)


def test_short_forms_of_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "commands: echo '${HOME} {print $1} {seed}'\n"
        "commits: [{commit: 1234567, expect: diverged, checks: {metric: loss, max: 1, at: 20}}]\n"
    )
    plan = read_plan(path)
    words = plan.commands[0].fill({"steps": 1, "seed": 5, "out": "/a b", "worktree": "/w"})
    assert words == ("/bin/sh", "-c", "echo '${HOME} {print $1} 5'")
    entry = plan.commits[0]
    assert entry.commit == "1234567" and entry.expect == ("diverged",)
    assert entry.checks == (Check(metric="loss", max=1.0, at=20),)
    assert entry.checks[0].text == "loss <= 1 (from step 20)"
