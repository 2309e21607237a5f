"""Cleaning: what vectors share for other reasons is removed, and what that cost is measured."""

from __future__ import annotations

from trimtab.vectors.clean.cleaning import clean, clean_vector, read_texts
from trimtab.vectors.clean.config import CleanConfig
from trimtab.vectors.clean.contamination import Contamination, from_concepts, from_neutral, keep_accurate
from trimtab.vectors.clean.manifold import Manifold, choose_dimension, task_manifold
from trimtab.vectors.clean.states import pooled_states
from trimtab.vectors.clean.steering import depth_gain, to_steering

__all__ = [
    "CleanConfig",
    "Contamination",
    "Manifold",
    "choose_dimension",
    "clean",
    "clean_vector",
    "depth_gain",
    "from_concepts",
    "from_neutral",
    "keep_accurate",
    "pooled_states",
    "read_texts",
    "task_manifold",
    "to_steering",
]
