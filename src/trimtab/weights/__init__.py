"""What training changed, read from the weights of two models through directions."""

from __future__ import annotations

from trimtab.weights.attention import ValueOutput, ValueProducts
from trimtab.weights.layer import LayerMath, Response
from trimtab.weights.load import Checkpoint, LayerWeights, load
from trimtab.weights.matrices import MatrixChange, Spectrum, compare_matrices
from trimtab.weights.pair import LayerPair, Pair, pair

__all__ = [
    "Checkpoint",
    "LayerMath",
    "LayerPair",
    "LayerWeights",
    "MatrixChange",
    "Pair",
    "Response",
    "Spectrum",
    "ValueOutput",
    "ValueProducts",
    "compare_matrices",
    "load",
    "pair",
]
