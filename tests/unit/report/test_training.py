"""Pages of trainings, sweeps and queues: what they say, in text and HTML."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.report import report
from trimtab.results import to_json
from trimtab.results.training import (
    Perplexities,
    QueueEstimate,
    QueueRun,
    RateSweep,
    SetEstimate,
    TrainedMap,
    Training,
    TrainingCounts,
    TrainingEvaluation,
    TrainingRow,
    TrainingStep,
    row_of,
)

TRAINING = Training(
    name="animal <b>",
    model="testbed",
    model_digest="xxh3:full:1",
    hidden_size=128,
    dtype="bfloat16",
    config={
        "loss": "lm",
        "learning_rate": 0.3,
        "schedule": "cosine",
        "warmup": 0.05,
        "positions": "all",
    },
    maps=(TrainedMap(site="layers.3.resid_post", kind="vector", width=128, norm=31.5, digest="d"),),
    steering_digest="0123456789abcdef0123",
    steps=tuple(
        TrainingStep(step=n, epoch=1, loss=2 / n, learning_rate=0.3, grad_norm=1 / n, norm=float(n))
        for n in (1, 2, 3, 4)
    ),
    evaluations=(
        TrainingEvaluation(step=2, epoch=1.0, loss=1.1, perplexity=3.0, best=True),
        TrainingEvaluation(step=4, epoch=2.0, loss=1.2, perplexity=3.3, best=False),
    ),
    best_step=2,
    best_loss=1.1,
    unsteered_loss=1.25,
    improved=True,
    stopped="early",
    validation=Perplexities(unsteered=3.49, steered=3.0, prompted=2.5),
    test=None,
    counts=TrainingCounts(
        sequences=12,
        tokens=300,
        targets=288,
        validation_sequences=4,
        validation_targets=90,
        test_sequences=0,
        test_targets=0,
        cut=1,
        dropped=0,
    ),
    seconds=1.5,
    tokens_per_second=400.0,
    peak_memory=2**30,
    resumed=0,
    notes=("a note",),
)
FAILED = TrainingRow(name="b", state="failed", error="InputError: no rows")
QUEUE = QueueRun(
    path="runs/v", folder="sets", model="testbed", rows=(row_of(TRAINING), FAILED), finished=False, workers=2,
    seconds=3.0,
    next_command="the same command with --retry (1 failed)",
)  # fmt: skip
SWEEP = RateSweep(
    name="animal", model="testbed", rows=(row_of(TRAINING), replace(row_of(TRAINING), learning_rate=1.0, loss=1.3)),
    best_rate=0.3, reason="lowest validation loss, 1.1", seconds=3.0,
)  # fmt: skip
ESTIMATE = QueueEstimate(
    folder="sets", model="testbed", sets=(
        SetEstimate(name="a", state="waiting", sequences=3, tokens=90, steps=10, seconds=90.0),
    ),
    tokens=450, seconds=90.0, memory=2**20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (TRAINING, ["better than the unsteered model", "3 against 3.49 unsteered", "the prompted model has 2.5",
                    "step 2 of 4", "training ended: early", "31.5", "a note"]),
        (QUEUE, ["1 of 2 sets trained; 1 failed", "no rows", "--retry"]),
        (SWEEP, ["Best learning rate: 0.3", "lowest validation loss"]),
        (ESTIMATE, ["1.5 minutes on one worker", "450 tokens"]),
    ],
)  # fmt: skip
def test_a_page_says_what_came_out(result: Training, words: list[str], tmp_path: Path) -> None:
    text = str(report(result))
    flat = " ".join(text.split())
    for word in words:
        assert word in flat
    (tmp_path / "r.json").write_text(to_json(result))
    page = Path(report(tmp_path / "r.json", tmp_path / "r.html")).read_text()  # read by its kind
    for word in words:
        assert word in page
    assert "<b>" not in page


def test_curves_leave_gaps_where_a_loss_is_not_finite(tmp_path: Path) -> None:
    steps = list(TRAINING.steps)
    steps[1] = replace(steps[1], loss=math.inf)
    report(replace(TRAINING, steps=tuple(steps)), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<figure>") == 4 and "nan" not in page.split("<svg", 1)[1]


def test_a_vector_that_helps_nothing_is_said() -> None:
    assert "no better than the unsteered model" in str(report(replace(TRAINING, improved=False)))
