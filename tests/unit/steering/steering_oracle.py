"""Exact arithmetic to hold the ops against: rationals, and rounding to a binary format written out by hand."""

from __future__ import annotations

from fractions import Fraction

import torch

PRECISION = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}


def rounded(value: Fraction, dtype: torch.dtype) -> Fraction:
    """Round to nearest, ties to even, in a binary format with subnormals (no overflow)."""
    precision, lowest = PRECISION[dtype]
    if value == 0:
        return value
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    below = size // step
    rest = size - below * step
    up = rest * 2 > step or (rest * 2 == step and below % 2 == 1)
    return (below + up) * step * (1 if value > 0 else -1)


def exact(tensor: torch.Tensor) -> list[Fraction]:
    return [Fraction(one) for one in tensor.double().tolist()]
