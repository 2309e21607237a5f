"""Does the steering work? Rollouts, scorers, side effects and the statistics that join them.

run = rollouts("testbed", prompts, vectors={"animal": "testbed:animal"}, scales=[-0.1, 0.1], out="runs/animal")
result = score(run.path, ["testbed:animal"])
"""

from __future__ import annotations

from trimtab.evaluate._files import Rollout, RolloutFiles, load
from trimtab.evaluate._rollouts import output_seed, rollouts
from trimtab.evaluate._score import score
from trimtab.evaluate.effects import auto_coefficient
from trimtab.evaluate.scorers import EmbeddingClassifier, Judge, JudgeConfig, TestbedScorer, VectorScorer
from trimtab.evaluate.variants import Variant, make_variants

__all__ = [
    "EmbeddingClassifier",
    "Judge",
    "JudgeConfig",
    "Rollout",
    "RolloutFiles",
    "TestbedScorer",
    "Variant",
    "VectorScorer",
    "auto_coefficient",
    "load",
    "make_variants",
    "output_seed",
    "rollouts",
    "score",
]
