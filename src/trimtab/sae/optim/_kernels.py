"""The compiled passes over parameters on a CPU. Import this module only when they are needed: it loads numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.sae._stored import jit, put, wide


@jit
def squares_of(values: Any, sums: Any, part: Any, start: Any, stop: Any) -> None:
    """Write the sums of squares of parts of so many elements."""
    for n in range(start, stop):
        total = 0.0
        for i in range(n * part, min((n + 1) * part, values.size)):
            value = np.float64(wide(values[i]))
            total += value * value
        sums[n] = total


@jit
def adam_rows(
    parameter: Any,
    gradient: Any,
    first: Any,
    second: Any,
    low: Any,
    clipped: Any,
    beta1: Any,
    beta2: Any,
    rate: Any,
    root: Any,
    eps: Any,
    length: Any,
    start: Any,
    stop: Any,
) -> None:
    """Move rows of a parameter: p -= rate m / (sqrt(v) root + eps), the copy for products beside it.

    `first` and `low` may have no elements. With `length` > 0 the gradient loses its part along the row, which is then
    brought to that length. Scalars have the parameter's dtype.
    """
    width = parameter.shape[1]
    moving, copying = first.size > 0, low.size > 0
    for i in range(start, stop):
        p, given, v = parameter[i], gradient[i], second[i]
        along = clipped * 0
        if length > 0:
            dot = square = clipped * 0
            for j in range(width):
                dot += p[j] * (clipped * wide(given[j]))
                square += p[j] * p[j]
            along = dot / square
        square = clipped * 0
        if moving:
            m = first[i]
            for j in range(width):
                g = clipped * wide(given[j]) - along * p[j]
                m[j] = beta1 * m[j] + (1 - beta1) * g
                v[j] = beta2 * v[j] + (1 - beta2) * g * g
                p[j] -= rate * m[j] / (np.sqrt(v[j]) * root + eps)
                square += p[j] * p[j]
        else:
            for j in range(width):
                g = clipped * wide(given[j]) - along * p[j]
                v[j] = beta2 * v[j] + (1 - beta2) * g * g
                p[j] -= rate * g / (np.sqrt(v[j]) * root + eps)
                square += p[j] * p[j]
        scale = length / np.sqrt(square) if length > 0 else clipped * 0 + 1
        if length > 0:
            for j in range(width):
                p[j] *= scale
        if copying:
            out = low[i]
            for j in range(width):
                put(out, j, p[j])
