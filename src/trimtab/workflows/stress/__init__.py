"""The scaling test of steering vectors: effect, coherence and cost at every sample size, and the knee."""

from __future__ import annotations

from trimtab.workflows.stress.figures import Series, effectiveness
from trimtab.workflows.stress.knee import find_knee
from trimtab.workflows.stress.run import stress

__all__ = ["Series", "effectiveness", "find_knee", "stress"]
