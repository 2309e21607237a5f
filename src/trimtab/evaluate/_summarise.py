"""From marks to figures: per variant, per strength, effect against damage, and the strength that holds up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
import polars as pl

from trimtab.evaluate import statistics
from trimtab.evaluate._files import Rollout, RolloutFiles
from trimtab.evaluate.scorers import Mark
from trimtab.evaluate.variants import UNSTEERED, Variant
from trimtab.results.evaluation import DoseResponse, Example, ParetoPoint, ScoreSummary, SideEffects, SplitHalf

_EXAMPLE_PROMPTS, _EXAMPLE_SIGNS = 2, 400

Marks = Mapping[str, Sequence[Mark]]


def summaries(files: RolloutFiles, rows: Sequence[Rollout], marks: Marks, *, seed: int) -> tuple[ScoreSummary, ...]:
    """Return count, mean, spread, refusals and missing values of each variant under each scorer."""
    found = []
    for scorer, listed in marks.items():
        for variant in files.variants:
            mine = [(row, mark) for row, mark in zip(rows, listed, strict=True) if row.variant == variant.name]
            if not mine:
                continue
            valued = [(row.prompt, mark.value) for row, mark in mine if mark.value is not None]
            values = [value for _, value in valued]
            mean = statistics.mean_over_prompts(values, [prompt for prompt, _ in valued], seed=seed)
            lost = [mark for _, mark in mine if mark.value is None and not mark.refusal]
            reasons = Counter(mark.reason or "no reason was given" for mark in lost).most_common(3)
            found.append(
                ScoreSummary(
                    variant=variant.name,
                    scorer=scorer,
                    count=len(values),
                    mean=mean.value,
                    std=stdev(values) if len(values) > 1 else math.nan,
                    low=mean.low,
                    high=mean.high,
                    refusals=sum(mark.refusal for _, mark in mine),
                    missing=len(lost),
                    reasons=tuple(f"{reason} ({count})" for reason, count in reasons),
                )
            )
    return tuple(found)


def doses(files: RolloutFiles, rows: Sequence[Rollout], marks: Marks, *, seed: int) -> tuple[DoseResponse, ...]:
    """Return the dose-response of each group of variants, unsteered outputs as strength 0."""
    found = []
    for group, members in _groups(files).items():
        scale = {one.name: one.scale for one in members} | {UNSTEERED: 0.0}
        for scorer, listed in marks.items():
            kept = [
                (scale[row.variant], mark.value, row.prompt)
                for row, mark in zip(rows, listed, strict=True)
                if row.variant in scale and mark.value is not None
            ]
            if not kept:
                continue
            scales, values, prompts = zip(*kept, strict=True)
            found.append(
                statistics.dose_response(
                    scales, values, prompts, group=group, scorer=scorer, unit=members[0].unit, seed=seed
                )
            )
    return tuple(found)


def points(summarised: Sequence[ScoreSummary], found: Sequence[SideEffects]) -> tuple[ParetoPoint, ...]:
    """Return effect against damage of every variant, per scorer; none without perplexities or unsteered outputs."""
    damage = {one.variant: one.perplexity_ratio for one in found}
    made: list[ParetoPoint] = []
    for scorer in dict.fromkeys(one.scorer for one in summarised):
        means = {one.variant: one.mean for one in summarised if one.scorer == scorer}
        if UNSTEERED not in means or UNSTEERED not in damage:
            continue
        listed = [(name, mean - means[UNSTEERED], damage[name]) for name, mean in means.items() if name in damage]
        made += statistics.pareto(listed, scorer=scorer)
    return tuple(made)


def gains(
    files: RolloutFiles, rows: Sequence[Rollout], marks: Marks, measured: pl.DataFrame, *, budget: float, seed: int
) -> tuple[SplitHalf, ...]:
    """Return, per group and scorer, the strength that half of the prompts choose and what the other half says of it."""
    perplexities = measured["perplexity"].to_list()
    found = []
    for group, members in _groups(files).items():
        names = [UNSTEERED, *(one.name for one in members)]
        damages = _per_prompt(rows, [None if one is None else math.log(one) for one in perplexities], names)
        for scorer, listed in marks.items():
            values = _per_prompt(rows, [mark.value for mark in listed], names)
            known = set(values) & set(damages) if damages else set(values)
            prompts = sorted(known)
            if len(prompts) < 2:
                continue
            gain = np.array([values[one] for one in prompts]).T
            harm = np.array([damages[one] for one in prompts]).T if damages else None
            found.append(
                statistics.split_half(
                    [float(one.scale or 0.0) for one in members],
                    gain[1:] - gain[0],
                    None if harm is None else harm[1:] - harm[0],
                    budget=math.log(budget),
                    seed=seed,
                    group=group,
                    scorer=scorer,
                )
            )
    return tuple(found)


def _groups(files: RolloutFiles) -> dict[str, list[Variant]]:
    groups: dict[str, list[Variant]] = {}
    for one in files.variants:
        if one.group and one.scale is not None:
            groups.setdefault(one.group, []).append(one)
    return groups


def _per_prompt(
    rows: Sequence[Rollout], values: Sequence[float | None], names: Sequence[str]
) -> dict[int, list[float]]:
    """Return the mean of each named variant for every prompt at which all of them have a value."""
    cells: dict[tuple[int, str], list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            cells.setdefault((row.prompt, row.variant), []).append(value)
    prompts = {prompt for prompt, _ in cells}
    whole = [one for one in prompts if all((one, name) in cells for name in names)]
    return {one: [fmean(cells[one, name]) for name in names] for one in whole}


def examples(rows: Sequence[Rollout], texts: Sequence[str]) -> tuple[Example, ...]:
    """Return the first output of every variant to each of the first prompts."""
    first = [row for row in rows if row.prompt < _EXAMPLE_PROMPTS and row.sample == 0]
    return tuple(
        Example(
            variant=row.variant,
            question=texts[row.prompt],
            text=row.text if len(row.text) <= _EXAMPLE_SIGNS else f"{row.text[:_EXAMPLE_SIGNS]}...",
        )
        for row in first
    )
