"""What training changed, read from the weights of two models through directions."""

from __future__ import annotations

from trimtab.weights.attention import ValueOutput
from trimtab.weights.layer import LayerMath
from trimtab.weights.load import Checkpoint, LayerWeights, load
from trimtab.weights.pair import LayerPair, Pair, pair

__all__ = ["Checkpoint", "LayerMath", "LayerPair", "LayerWeights", "Pair", "ValueOutput", "load", "pair"]
