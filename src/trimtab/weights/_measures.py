"""What the measures are called and what they say."""

from __future__ import annotations

from trimtab.results.weights import AnalysisName, WeightsMeasure

FOCUS: dict[AnalysisName, tuple[tuple[str, str], ...]] = {
    "susceptibility": tuple((part, "relative_change") for part in ("q", "k", "v", "o", "gate", "up", "down", "router")),
    "mlp": (("mlp", "absolute"), ("mlp", "angular")),
    "attention": (("qk", "affinity"), ("vo", "change"), ("vo", "promotion")),
}
"""(part, measure) whose layer of the largest change is named, first the one that opens the report."""

_MEANINGS: dict[str, tuple[str, str, str, bool]] = {
    "relative_change": ("Relative change", "|tuned - base| / |base| of the output for the direction", "", False),
    "angle": ("Angle", "between the base and the tuned output for the direction", "radians", False),
    "cosine_distance": ("Cosine distance", "1 - cosine of the base and the tuned output", "", False),
    "norm_ratio": ("Length ratio - 1", "how much longer the tuned output is, as a share", "", True),
    "absolute": ("Absolute change", "|tuned - base| of what the MLP adds for the direction", "hidden units", False),
    "excess": ("Change for its length", "|tuned - base| over what controls whose output is as long change by", "times",
               False),
    "angular": ("Angular change", "1 - cosine of what the base and the tuned MLP add", "", False),
    "length": ("Length", "of what is added to the stream for the direction", "hidden units", True),
    "parallel": ("Along the direction", "above 0 the MLP reinforces the direction", "hidden units", True),
    "orthogonal": ("Across the direction", "the rest of what the MLP adds", "hidden units", True),
    "affinity": ("Affinity", "attention logit of a query and a key along the direction, mean over heads", "", True),
    "promotion": ("Promotion", "what attending to the direction writes along it", "hidden units", True),
    "change": ("Change of what is written", "|tuned - base| of what attending to the direction writes", "hidden units",
               False),
}  # fmt: skip


def describe(part: str, measure: str) -> WeightsMeasure:
    """Return the label, meaning and unit of a measure."""
    label, meaning, unit, two_sided = _MEANINGS[measure]
    return WeightsMeasure(measure=measure, part=part, label=label, meaning=meaning, unit=unit, two_sided=two_sided)
