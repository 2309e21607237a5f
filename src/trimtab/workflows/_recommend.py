"""One sentence of advice with its evidence: would doing only the op's arithmetic in more precision have helped?"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.results import ConfigRow, DriftCell, Recommendation
from trimtab.stats import paired_bootstrap
from trimtab.workflows.config import SweepConfig

METRIC = "teacher-forced rel_l2 at the last layer, mean over the steps of a prompt"
MIN_PAIRS = 3


def recommend(
    configs: Sequence[SweepConfig], rows: Sequence[ConfigRow], drift: Sequence[DriftCell], seed: int
) -> Recommendation | None:
    """Compare the two configurations that differ in the ops' arithmetic alone.

    The unit of the paired bootstrap is the prompt: rows of one prompt are not independent.

    Returns:
        None when no such pair was run.
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
    interval = paired_bootstrap(before, after, seed=seed)
    base = sum(before) / len(before)
    measurable = interval.low > 0 or interval.high < 0
    tokens = {row.label: row for row in rows}
    sentence = _sentence(
        baseline, alternative, interval.estimate / base if base else 0.0, interval.low, interval.high, base
    )
    return Recommendation(
        sentence=f"{sentence} {_agreement(tokens[baseline.label], tokens[alternative.label])}",
        question=(
            f"Does doing only the op's arithmetic in {alternative.op_math} bring the {baseline.dtype} model nearer "
            "to the reference?"
        ),
        metric=METRIC,
        baseline=baseline.label,
        alternative=alternative.label,
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        confidence=0.95,
        num_pairs=len(prompts),
        measurable=measurable,
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
    baseline: SweepConfig, alternative: SweepConfig, share: float, low: float, high: float, base: float
) -> str:
    evidence = (
        f"it changes the last layer's drift by {share:+.1%} (95% interval {low / base:+.1%} to {high / base:+.1%})"
        if base
        else "there is no drift to change"
    )
    if low <= 0 <= high:
        return (
            f"Stay with {baseline.label}: no measurable difference from doing only the op's arithmetic in "
            f"{alternative.op_math}; {evidence}."
        )
    if high < 0:
        return f"Do the op's arithmetic in {alternative.op_math} ({alternative.label}): {evidence}."
    return f"Stay with {baseline.label}: the op's arithmetic in {alternative.op_math} makes it worse; {evidence}."


def _agreement(baseline: ConfigRow, alternative: ConfigRow) -> str:
    return (
        f"Tokens equal to the reference's: {baseline.match_ratio:.1%} with {baseline.label}, "
        f"{alternative.match_ratio:.1%} with {alternative.label}."
    )
