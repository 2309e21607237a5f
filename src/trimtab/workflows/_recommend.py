"""One sentence of advice with its evidence: would doing only the op's arithmetic in more precision have helped?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trimtab.results import ConfigRow, DriftCell, Recommendation
from trimtab.stats import Interval, paired_bootstrap
from trimtab.workflows.config import SweepConfig

METRIC = "teacher-forced rel_l2 at the last layer, mean over the steps of a prompt"
MIN_PAIRS = 3


def recommend(
    configs: Sequence[SweepConfig],
    rows: Sequence[ConfigRow],
    drift: Sequence[DriftCell],
    *,
    reference: str,
    op: str = "op",
    seed: int = 0,
) -> Recommendation | None:
    """Compare the two configurations that differ in the ops' arithmetic alone.

    The unit of the paired bootstrap is the prompt: rows of one prompt are not independent.

    Args:
        configs: configurations that were compared with the reference.
        rows: their summaries.
        drift: their teacher-forced drift.
        reference: label of the reference.
        op: what the steering does, in a word: "cap".
        seed: seed of the bootstrap.

    Returns:
        None when no such pair was run, over fewer than three prompts, or with a drift that is not finite.
    """
    pair = _pair(configs)
    if pair is None:
        return None
    baseline, alternative = pair
    means = [_prompt_means(drift, label) for label in (baseline.label, alternative.label)]
    prompts = sorted(means[0].keys() & means[1].keys())
    if len(prompts) < MIN_PAIRS:
        return None
    before, after = ([mean[prompt] for prompt in prompts] for mean in means)
    if not all(math.isfinite(value) for value in (*before, *after)):
        return None
    interval = paired_bootstrap(after, before, seed=seed)
    tokens = next(row for row in rows if row.label == baseline.label)
    return Recommendation(
        sentence=_sentence(baseline, alternative, tokens, interval, reference, op),
        question=f"Would doing only the {op}'s arithmetic in {alternative.op_math} have helped?",
        metric=METRIC,
        baseline=baseline.label,
        alternative=alternative.label,
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        confidence=0.95,
        num_pairs=len(prompts),
        measurable=interval.low > 0 or interval.high < 0,
    )


def _pair(configs: Sequence[SweepConfig]) -> tuple[SweepConfig, SweepConfig] | None:
    for one in configs:
        for two in configs:
            same = (one.backend, one.dtype) == (two.backend, two.dtype)
            if same and one.op_math in ("model", one.dtype) and two.op_math == "float32" != one.dtype:
                return one, two
    return None


def _prompt_means(drift: Sequence[DriftCell], label: str) -> dict[int, float]:
    last = max((cell.layer for cell in drift), default=0)
    found: dict[int, list[float]] = {}
    for cell in drift:
        if cell.config == label and cell.layer == last:
            found.setdefault(cell.prompt, []).append(cell.rel_l2)
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}


def _sentence(
    baseline: SweepConfig, alternative: SweepConfig, tokens: ConfigRow, interval: Interval, reference: str, op: str
) -> str:
    same = tokens.identical_prompts == tokens.num_prompts
    tokens_part = f"{baseline.label} {'generates' if same else 'does not generate'} the same tokens as {reference} here"
    doing = f"doing only the {op}'s arithmetic in {alternative.op_math}"
    if interval.low <= 0 <= interval.high:
        advice = "use it as it is" if same else f"run {reference} where tokens must be equal"
        return f"{tokens_part}, and {doing} makes no measurable difference: {advice}."
    if interval.high < 0:
        return f"{tokens_part}, and {doing} brings it measurably nearer: use {alternative.label}."
    return f"{tokens_part}, and {doing} takes it measurably further away: stay with {baseline.label}."
