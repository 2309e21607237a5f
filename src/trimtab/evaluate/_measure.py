"""Side effects of a rollout run: one row per output, and one summary per variant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from trimtab.backends import Backend, Prompt
from trimtab.errors import SiteError
from trimtab.evaluate import effects
from trimtab.evaluate._files import Rollout, RolloutFiles
from trimtab.evaluate.variants import UNSTEERED, Variant, apply_prompt
from trimtab.results.evaluation import SideEffects

_PLAIN = Variant(name=UNSTEERED)


def base_prompts(
    files: RolloutFiles, rows: Sequence[Rollout], opened: Callable[[], Backend]
) -> dict[int, tuple[int, ...]]:
    """Return the tokens of each prompt without any condition: those of an unsteered variant, else made anew."""
    bare = {one.name for one in files.variants if not one.system}
    found = {row.prompt: row.prompt_ids for row in rows if row.variant in bare}
    for index in {row.prompt for row in rows} - set(found):
        prompt = apply_prompt(_PLAIN, files.plan.prompts[index], no_system=files.plan.no_system)
        found[index] = opened().encode(prompt).ids
    return found


def measure(rows: Sequence[Rollout], files: RolloutFiles, backend: Backend | None) -> pl.DataFrame:
    """Return what each output is like; perplexities and what rests on them are null without a backend."""
    perplexities: list[float | None] = [None] * len(rows)
    if backend is not None:
        bases = base_prompts(files, rows, lambda: backend)
        found = effects.continuation_perplexities(
            backend, [bases[row.prompt] for row in rows], [row.token_ids for row in rows]
        )
        perplexities = [None if math.isnan(one) else one for one in found]
    frame = pl.DataFrame(
        {
            "variant": [row.variant for row in rows],
            "prompt": [row.prompt for row in rows],
            "sample": [row.sample for row in rows],
            "tokens": [len(row.token_ids) for row in rows],
            "perplexity": pl.Series(perplexities, dtype=pl.Float64),
            "distinct_1": [effects.distinct(row.token_ids, 1) for row in rows],
            "distinct_2": [effects.distinct(row.token_ids, 2) for row in rows],
            "repetition_4": [effects.repetition(row.token_ids) for row in rows],
            "loop": [effects.is_loop(row.token_ids) for row in rows],
            "refusal": [effects.is_refusal(row.text) for row in rows],
        }
    )
    reference = frame.filter(variant=UNSTEERED)["perplexity"].median()
    if not isinstance(reference, float):
        return frame.with_columns(coherent=pl.lit(None, dtype=pl.Boolean))
    coherent = [
        effects.is_coherent(row.token_ids, math.inf if one is None else one, reference)
        for row, one in zip(rows, perplexities, strict=True)
    ]
    return frame.with_columns(coherent=pl.Series(coherent, dtype=pl.Boolean))


def side_effects(
    files: RolloutFiles,
    rows: Sequence[Rollout],
    measured: pl.DataFrame,
    backend: Backend | None,
    texts: Sequence[Prompt],
) -> tuple[tuple[SideEffects, ...], tuple[str, ...]]:
    """Return one summary per variant that has outputs, and what could not be measured."""
    kl: dict[str, float] = {}
    problems: tuple[str, ...] = ()
    if backend is not None:
        try:
            kl = _kl(files, rows, backend)
        except SiteError as error:  # an engine that was started without recording logits
            problems = (f"the KL was not measured: {error}",)
    plain = _number(measured.filter(variant=UNSTEERED)["perplexity"].median())
    found = []
    for one in files.variants:
        part = measured.filter(variant=one.name)
        if not part.height:
            continue
        middle = _number(part["perplexity"].median())
        kept = math.nan
        if texts and backend is not None and not one.system:
            kept = effects.retention(backend, one.steering, texts)
        found.append(
            SideEffects(
                variant=one.name,
                count=part.height,
                perplexity=middle,
                perplexity_ratio=middle / plain,
                distinct_1=_number(part["distinct_1"].mean()),
                distinct_2=_number(part["distinct_2"].mean()),
                repetition_4=_number(part["repetition_4"].mean()),
                loops=_number(part["loop"].mean()),
                refusal_rate=_number(part["refusal"].mean()),
                coherent=_number(part["coherent"].mean()),
                tokens=_number(part["tokens"].mean()),
                kl=kl.get(one.name, math.nan),
                retention=kept,
            )
        )
    return tuple(found), problems


def _kl(files: RolloutFiles, rows: Sequence[Rollout], backend: Backend) -> dict[str, float]:
    """Return the KL of each variant along the first unsteered continuation of every prompt."""
    plain = [row for row in rows if row.variant == UNSTEERED and row.sample == 0 and row.token_ids]
    variants = [one for one in files.variants if not one.system]
    if not plain:
        return {}
    found = effects.drift(
        backend, [one.steering for one in variants], [row.prompt_ids for row in plain], [row.token_ids for row in plain]
    )
    return {one.name: float(value) for one, value in zip(variants, found.kl.mean(axis=1), strict=True)}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
