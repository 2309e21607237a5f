"""What a direction separates on held-out rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Booleans = np.ndarray[Any, np.dtype[np.bool_]]


class Reading(NamedTuple):
    """Evidence of one site; see `results.vectors.SiteEvidence`."""

    auc: float
    accuracy: float
    separation: float
    random_auc: float | None
    covariance_auc: float | None
    shuffled_auc: float | None


def read(scores: Floats, positive: Booleans, threshold: float, controls: int) -> Reading:
    """Judge the first column, and the controls in the others.

    Args:
        scores: float64 [N, 1 + 3 * controls], projections: the vector, then random, covariance and shuffled ones.
        positive: [N], which rows are positive.
        threshold: halfway between the training means.
        controls: of each kind.
    """
    own = scores[:, 0]
    above, below = own[positive], own[~positive]
    parts = [scores[:, 1 + kind * controls : 1 + (kind + 1) * controls] for kind in range(3)]
    highest = [_highest(part, positive) if controls else None for part in parts]
    return Reading(
        auc=auc(own, positive),
        accuracy=float((np.mean(above > threshold) + np.mean(below <= threshold)) / 2),
        separation=separation(above, below),
        random_auc=highest[0],
        covariance_auc=highest[1],
        shuffled_auc=highest[2],
    )


def auc(scores: Floats, positive: Booleans) -> float:
    """Return the share of (positive, negative) pairs in which the positive scores higher; ties count half."""
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    count, rest = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest))


def separation(above: Floats, below: Floats) -> float:
    """Return the distance of the means over the root of the mean variance; 0 for equal means, inf without spread."""
    distance = float(above.mean() - below.mean())
    spread = float(np.sqrt((above.var() + below.var()) / 2))
    if spread == 0:
        return 0.0 if distance == 0 else float(np.copysign(np.inf, distance))
    return distance / spread


def _highest(scores: Floats, positive: Booleans) -> float:
    """The 95th percentile over directions, whichever way each points."""
    found = [auc(column, positive) for column in scores.T]
    return float(np.quantile([max(one, 1 - one) for one in found], 0.95))
