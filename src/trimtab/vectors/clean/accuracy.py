"""Retained accuracy: whether a cleaned vector still tells its concept from the other side."""

from __future__ import annotations

import numpy as np

from trimtab.vectors.clean.linear import Matrix


def accuracy(vector: Matrix, fit: tuple[Matrix, Matrix], held: tuple[Matrix, Matrix]) -> float:
    """Return the balanced accuracy of `<h, v> > threshold` on held-out states: the mean of both sides; 0.5 is chance.

    Args:
        vector: [d].
        fit: positive and negative states [n, d], whose projections' midpoint is the threshold.
        held: positive and negative states of other questions.
    """
    threshold = (float((fit[0] @ vector).mean()) + float((fit[1] @ vector).mean())) / 2
    right = [np.mean(held[0] @ vector > threshold), np.mean(held[1] @ vector <= threshold)]
    return float(np.mean(right))
