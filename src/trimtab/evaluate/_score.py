"""Scoring a rollout run: marks, side effects, and the statistics that join them, in the run's directory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from trimtab._base.files import atomic_write_text
from trimtab._base.progress import progress
from trimtab.backends import Backend, Prompt, open_backend
from trimtab.errors import InputError
from trimtab.evaluate import _files
from trimtab.evaluate._files import Rollout, RolloutFiles
from trimtab.evaluate._measure import base_prompts, measure, side_effects
from trimtab.evaluate._summarise import doses, examples, gains, points, summaries
from trimtab.evaluate.scorers import Mark, Output, Scorer
from trimtab.evaluate.scorers.parse import parse_scorer
from trimtab.evaluate.variants import buffers, question
from trimtab.results import to_json
from trimtab.results.evaluation import ClassifierReport, Evaluation, SideEffects

SCORES, QUESTIONS, EFFECTS, SUMMARY = "scores.parquet", "per_question.parquet", "effects.parquet", "summary.json"


def score(
    path: str | Path,
    scorers: Sequence[str | Scorer],
    *,
    effects: bool = True,
    retention: Sequence[Prompt] = (),
    budget: float = 1.5,
    judge: Mapping[str, Any] | None = None,
    seed: int = 0,
    model: Any = None,
    device: str | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Score the outputs of a rollout run, and write what was found beside them.

    Writes `scores.parquet` (one row per output and scorer), `per_question.parquet`, `effects.parquet` (one row per
    output) and `summary.json` (the result). Scorers see question and continuation, never the variant.

    Args:
        path: directory of the run; an unfinished one is scored as far as it goes.
        scorers: `testbed:ATTRIBUTE` (`:share` for the share alone), `vector:FILE`, `classifier:DATA.jsonl`, `judge`, or
            scorers of your own.
        effects: measure side effects, which needs the unsteered model.
        retention: texts on which every steering should change nothing.
        budget: most perplexity, as a ratio to the unsteered, at which a strength may be chosen.
        judge: settings of the scorer `judge`; see `JudgeConfig`.
        seed: of intervals and splits.
        model: an open backend of the run's model; None opens it as the rollouts did.
        device: where the model runs.
        batch_size: texts that run together.

    Returns:
        The evaluation. `finished` is False when outputs are missing, or a scorer gave out: score again to go on.

    Raises:
        InputError: no rollouts there, an unknown scorer, or another model.

    Example:
        >>> result = score("runs/animal", ["testbed:animal"])
    """
    files = _files.load(path)
    rows = files.rows()
    if not rows:
        raise InputError(f"{files.path} has no output yet; go on with the rollouts first")
    if not scorers:
        raise InputError("no scorer was given; for instance testbed:animal, vector:FILE, classifier:DATA.jsonl, judge")
    if not math.isfinite(budget) or budget < 1:
        raise InputError(f"budget is {budget}; a perplexity ratio of at least 1 was expected")
    asked = {"cache": str(files.path / "judge"), **(judge or {})}
    texts = [question(prompt) for prompt in files.plan.prompts]
    with _model(files, model, device, batch_size) as opened:
        made = [parse_scorer(one, opened, asked) if isinstance(one, str) else one for one in scorers]
        names = [one.name for one in made]
        if len(set(names)) < len(names):
            raise InputError(f"two scorers are called {max(names, key=names.count)!r}; give each once")
        outputs = _outputs(files, rows, texts, opened)
        marks: dict[str, list[Mark]] = {}
        found: tuple[SideEffects, ...] = ()
        problems: tuple[str, ...] = ()
        with progress("score", len(made) + 1) as bar:
            for one in made:
                bar.describe(one.name)
                marks[one.name] = _marked(one, outputs)
                bar.advance()
            bar.describe("side effects")
            measured = measure(rows, files, opened() if effects else None)
            if effects:
                found, problems = side_effects(files, rows, measured, opened(), retention)
            bar.advance()
    result = _evaluation(files, rows, marks, measured, found, budget=budget, seed=seed, made=made, problems=problems)
    _write(files, rows, texts, marks, measured, result)
    return result


def _marked(scorer: Scorer, outputs: Sequence[Output]) -> list[Mark]:
    """Score each different output once."""
    different = list(dict.fromkeys(outputs))
    given = scorer.score(different)
    if len(given) != len(different):
        raise InputError(f"scorer {scorer.name!r} gave {len(given)} marks for {len(different)} outputs")
    found = dict(zip(different, (_finite(one) for one in given), strict=True))
    return [found[one] for one in outputs]


def _finite(mark: Mark) -> Mark:
    if mark.value is None or math.isfinite(mark.value):
        return mark
    return Mark(value=None, reason=f"the scorer gave {mark.value}")


def _outputs(files: RolloutFiles, rows: Sequence[Rollout], texts: Sequence[str], opened: Any) -> list[Output]:
    bases = base_prompts(files, rows, opened)
    return [
        Output(question=texts[row.prompt], text=row.text, prompt_ids=bases[row.prompt], token_ids=row.token_ids)
        for row in rows
    ]


class _Model:
    """Opens the run's model when it is first asked for."""

    def __init__(self, files: RolloutFiles, given: Any, options: Mapping[str, Any]) -> None:
        self._files, self._backend, self._given, self._options = files, given, given is not None, options

    def __call__(self) -> Backend:
        plan = self._files.plan
        if self._backend is None:
            options = dict(self._options)
            if plan.backend == "vllm":
                options |= buffers(self._files.variants) | {"capture_sites": ("logits",)}
            self._backend = open_backend(plan.backend, plan.model, dtype=plan.dtype, **options)
        digest = self._backend.info.weights_digest
        if digest != plan.model_digest:
            raise InputError(
                f"{self._files.path} was made by weights {plan.model_digest[:12] or 'unknown'}, and this model has "
                f"{digest[:12] or 'unknown'}; give the same model"
            )
        backend: Backend = self._backend
        return backend

    def close(self) -> None:
        if self._backend is not None and not self._given:
            self._backend.close()


@contextmanager
def _model(files: RolloutFiles, given: Any, device: str | None, batch_size: int | None) -> Iterator[_Model]:
    asked = {"device": device, "batch_size": batch_size}
    model = _Model(files, given, {key: value for key, value in asked.items() if value is not None})
    try:
        yield model
    finally:
        model.close()


def _evaluation(
    files: RolloutFiles,
    rows: Sequence[Rollout],
    marks: Mapping[str, Sequence[Mark]],
    measured: pl.DataFrame,
    found: tuple[SideEffects, ...],
    *,
    budget: float,
    seed: int,
    made: Sequence[Scorer],
    problems: Sequence[str],
) -> Evaluation:
    summarised = summaries(files, rows, marks, seed=seed)
    empty = sorted({one.scorer for one in summarised} - {one.scorer for one in summarised if one.count})
    again = {name for name, listed in marks.items() if any(one.retry for one in listed)}
    warnings = [f"{len(rows)} of {files.expected} outputs are there"] if len(rows) < files.expected else []
    warnings += [f"{name} gave out before the end: score again to go on where it stopped" for name in sorted(again)]
    held_out = (getattr(one, "report", None) for one in made)
    reports = [one for one in held_out if isinstance(one, ClassifierReport)]
    return Evaluation(
        passed=not empty,
        reason=f"{', '.join(empty)} gave no value to any output" if empty else "every scorer gave values",
        path=str(files.path),
        model=files.plan.model,
        scorers=tuple(marks),
        count=len(rows),
        summaries=summarised,
        effects=found,
        dose_responses=doses(files, rows, marks, seed=seed),
        pareto=points(summarised, found),
        split_half=gains(files, rows, marks, measured, budget=budget, seed=seed),
        classifiers=tuple(reports),
        examples=examples(rows, [question(prompt) for prompt in files.plan.prompts]),
        finished=len(rows) == files.expected and not again,
        warnings=(*warnings, *problems),
    )


def _write(
    files: RolloutFiles,
    rows: Sequence[Rollout],
    texts: Sequence[str],
    marks: Mapping[str, Sequence[Mark]],
    measured: pl.DataFrame,
    result: Evaluation,
) -> None:
    of = {one.name: one for one in files.variants}
    records = [
        {
            "variant": row.variant,
            "group": of[row.variant].group,
            "scale": of[row.variant].scale,
            "unit": of[row.variant].unit,
            "prompt": row.prompt,
            "sample": row.sample,
            "question": texts[row.prompt],
            "scorer": name,
            "value": mark.value,
            "refusal": mark.refusal,
            "reason": mark.reason,
        }
        for name, listed in marks.items()
        for row, mark in zip(rows, listed, strict=True)
    ]
    frame = pl.DataFrame(records, infer_schema_length=None).cast({"scale": pl.Float64, "value": pl.Float64})
    frame.write_parquet(files.path / SCORES)
    keys = ["variant", "scorer", "prompt", "question"]
    value = pl.col("value")
    frame.group_by(keys, maintain_order=True).agg(
        value.count().alias("count"),
        value.mean().alias("mean"),
        value.std().alias("std"),
        pl.col("refusal").sum().alias("refusals"),
        (value.is_null() & ~pl.col("refusal")).sum().alias("missing"),
    ).write_parquet(files.path / QUESTIONS)
    measured.write_parquet(files.path / EFFECTS)
    atomic_write_text(files.path / SUMMARY, to_json(result))
