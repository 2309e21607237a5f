"""What training changed, read from the weights of two models through directions."""

from __future__ import annotations

from trimtab.weights._sources import read_directions
from trimtab.weights.attention import ValueOutput, ValueProducts
from trimtab.weights.attention_change import measure_attention
from trimtab.weights.directions import DirectionSet, Named, covariance_matched, isotropic, shuffled_labels
from trimtab.weights.layer import LayerMath, Response
from trimtab.weights.load import Checkpoint, LayerWeights, load
from trimtab.weights.matrices import MatrixChange, Spectrum, compare_matrices
from trimtab.weights.mlp_change import measure_mlp
from trimtab.weights.pair import LayerPair, Pair, pair
from trimtab.weights.run import WeightsRun
from trimtab.weights.susceptibility import measure_susceptibility

__all__ = [
    "Checkpoint",
    "DirectionSet",
    "LayerMath",
    "LayerPair",
    "LayerWeights",
    "MatrixChange",
    "Named",
    "Pair",
    "Response",
    "Spectrum",
    "ValueOutput",
    "ValueProducts",
    "WeightsRun",
    "compare_matrices",
    "covariance_matched",
    "isotropic",
    "load",
    "measure_attention",
    "measure_mlp",
    "measure_susceptibility",
    "pair",
    "read_directions",
    "shuffled_labels",
]
