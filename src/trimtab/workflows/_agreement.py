"""Free-running tokens of two configurations, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from trimtab.results.analysis import SIGNIFICANT_DRIFT


@dataclass(frozen=True, slots=True)
class Tokens:
    """The generated tokens of one prompt, in order."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    positions: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, frame: pl.DataFrame, prompt: int) -> Tokens:
        """Read one prompt's generated tokens from a trace's token table."""
        rows = frame.filter((pl.col("prompt") == prompt) & pl.col("generated")).sort("position")
        return cls(
            ids=tuple(rows["token_id"].to_list()),
            texts=tuple(rows["text"].to_list()),
            positions=tuple(rows["position"].to_list()),
            top_ids=tuple(tuple(one or ()) for one in rows["top_ids"].to_list()),
            top_logprobs=tuple(tuple(one or ()) for one in rows["top_logprobs"].to_list()),
        )

    def margin(self, step: int) -> float | None:
        """Return log-probability of the top-1 minus the top-2 token at a step, in nats."""
        if step >= len(self.top_logprobs) or len(self.top_logprobs[step]) < 2:
            return None
        return self.top_logprobs[step][0] - self.top_logprobs[step][1]


@dataclass(frozen=True, slots=True)
class Match:
    """How two token sequences agree."""

    ratio: float
    first_divergence: int | None
    length_delta: int

    @property
    def significant(self) -> bool:
        """Whether the ratio is under the line that is called significant drift."""
        return self.ratio < SIGNIFICANT_DRIFT


def match(reference: tuple[int, ...], candidate: tuple[int, ...]) -> Match:
    """Compare token ids place by place.

    The ratio is equal tokens at equal places over the reference's length (1 when both are empty). The first divergence
    is the first place that differs, or where the shorter one ends.
    """
    equal = [a == b for a, b in zip(reference, candidate, strict=False)]
    first: int | None = equal.index(False) if False in equal else None
    if first is None and len(reference) != len(candidate):
        first = min(len(reference), len(candidate))
    ratio = sum(equal) / len(reference) if reference else float(not candidate)
    return Match(ratio, first, len(candidate) - len(reference))


def explain(
    found: Match, margin: float | None, median_margin: float | None, drift: float | None, shift: float | None
) -> str:
    """Say how a divergence relates to the drift before it and to the reference's margin at that step.

    Args:
        found: the divergence.
        margin: the reference's top-1 over top-2 at the divergence, in nats.
        median_margin: the same over all steps.
        drift: rel_l2 of the last layer's row that predicts the diverging token.
        shift: how far a step usually moves a log-probability: the median over the prompt's teacher-forced steps. What
            moved at the divergence itself is no evidence: it is at least the margin, or there were no divergence.
    """
    if found.first_divergence is None:
        return "same tokens throughout"
    if margin is None or shift is None:
        return f"tokens differ from step {found.first_divergence}; no log-probabilities there to relate it to"
    drifted = "" if drift is None else f" after a drift of {drift:.1e} (rel_l2, last layer)"
    usual = "" if median_margin is None else f" (median over steps {median_margin:.2g})"
    apart = f"the reference's two best tokens were {margin:.2g} nats apart{usual}{drifted}"
    moves = f"precision usually moves log-probabilities by {shift:.2g} here"
    if margin <= 2 * shift:  # two tokens may move against each other
        return f"at step {found.first_divergence} {apart}, and {moves}: a near tie, decided by rounding"
    return f"at step {found.first_divergence} {apart}, and {moves}: rounding of the usual size does not explain it"
