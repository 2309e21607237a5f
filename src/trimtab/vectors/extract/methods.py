"""Methods: from the sums of a site to its direction. Pure functions in float64.

Every vector is scaled to the distance of the labels' means along it, so that adding it once moves one mean to the other
(along it), whatever the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.vectors.extract.sums import Needs, Sums

Floats = np.ndarray[Any, np.dtype[np.float64]]
_RIDGE = 1e-3
_SAMPLE = 1024
_VOTERS = 256


class Found(NamedTuple):
    """A direction, in any length and with its sign, and what the method says of it."""

    direction: Tensor
    note: str = ""


class Method(NamedTuple):
    """A method, what it needs, and how many examples of each label (or pairs) it takes at least."""

    solve: Callable[[Sums], Found]
    needs: Needs
    least: int


def mean_difference(sums: Sums) -> Found:
    """The difference of the labels' means."""
    return Found(sums.difference)


def pca(sums: Sums) -> Found:
    """The first principal axis of the pairs' differences, uncentred; each pair votes for the sign.

    The axis of `sum d d^T` is that of the differences in both orders. Its sign is arbitrary: it is the one along which
    more differences (positive minus negative) point; a draw goes to the mean.
    """
    assert sums.second is not None, "differences of pairs were not asked for"
    second = sums.second.cpu().numpy() / sums.pairs
    axis, share = _first_axis(second, sums.difference.cpu().numpy())
    votes = sums.sample[: sums.kept].double().numpy() @ axis
    ayes, noes = int((votes > 0).sum()), int((votes < 0).sum())
    along = float(sums.difference.cpu().numpy() @ axis)
    sign = 1.0 if (ayes, along) > (noes, 0.0) else -1.0
    note = f"{max(ayes, noes)} of {sums.kept} pairs vote for the sign; the axis has {share:.1%} of the differences"
    return Found(torch.from_numpy(sign * axis), note)


def mass_mean(sums: Sums) -> Found:
    """The mass-mean probe `C^-1 (m+ - m-)` (Marks and Tegmark 2023), `C` the covariance within the labels.

    A ridge of a thousandth of the mean variance stands in where there are fewer examples than dimensions.
    """
    covariance = sums.covariance
    mean_variance = float(covariance.diagonal().mean())
    return Found(_whitened(sums, covariance, _RIDGE * mean_variance), f"ridge {_RIDGE:g} of the mean variance")


def lda(sums: Sums) -> Found:
    """Fisher's linear discriminant `S^-1 (m+ - m-)`, with the covariance shrunk to a multiple of the identity.

    How far is given by the oracle approximating estimator (Chen, Wiesel, Eldar and Hero 2010), from the traces alone:
    `rho = ((1 - 2/p) tr(C^2) + tr(C)^2) / ((n + 1 - 2/p) (tr(C^2) - tr(C)^2 / p))`, at most 1.
    """
    covariance = sums.covariance
    count, width = sum(sums.counts) - 2, covariance.shape[0]
    trace = float(covariance.trace())
    squares = float((covariance * covariance).sum())
    gap = (count + 1 - 2 / width) * (squares - trace * trace / width)
    share = 1.0 if gap <= 0 else min(1.0, ((1 - 2 / width) * squares + trace * trace) / gap)
    shrunk = (1 - share) * covariance
    return Found(_whitened(sums, shrunk, share * trace / width), f"shrinkage {share:.3f}")


def logistic(sums: Sums) -> Found:
    """The weights of a logistic regression on the sample: labels balanced, penalty |w|^2 / 2 on rows of unit scale.

    Minimises `sum_i c_i log(1 + exp(-y_i (<w, x_i> + b))) + |w|^2 / 2`, `c_i = n / (2 n_label)`, by L-BFGS in the span
    of the rows.
    """
    rows = sums.sample[: sums.kept].double().numpy()
    signs = np.where(sums.sample_labels[: sums.kept] == 0, 1.0, -1.0)
    if len(set(signs.tolist())) < 2:
        raise InputError(f"the sample of {sums.kept} rows has one label alone; balance the labels")
    weights, _ = fit_logistic(rows, signs)
    return Found(torch.from_numpy(weights), f"fitted on {sums.kept} of {sums.seen} rows")


def fit_logistic(rows: Floats, signs: Floats) -> tuple[Floats, float]:
    """Fit weights [D] and intercept to rows [N, D] with signs of -1 and 1; see `logistic`."""
    from scipy.optimize import minimize

    centre = rows.mean(axis=0)
    centred = rows - centre
    scale = math.sqrt(float((centred**2).mean())) or 1.0
    left, values, right = np.linalg.svd(centred / scale, full_matrices=False)
    features = left * values
    each = np.where(signs > 0, 0.5 / np.mean(signs > 0), 0.5 / np.mean(signs < 0))

    def loss(point: Floats) -> tuple[float, Floats]:
        margin = signs * (features @ point[:-1] + point[-1])
        pull = -each * signs / (1 + np.exp(np.minimum(margin, 700)))
        slope = np.append(features.T @ pull + point[:-1], pull.sum())
        return float(each @ np.logaddexp(0, -margin) + point[:-1] @ point[:-1] / 2), slope

    best = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    weights = right.T @ best[:-1] / scale
    return weights, float(best[-1] - weights @ centre)


METHODS: Mapping[str, Method] = {
    "mean_difference": Method(mean_difference, Needs(), 1),
    "pca": Method(pca, Needs(pairs=True, sample=_VOTERS), 2),
    "logistic": Method(logistic, Needs(sample=_SAMPLE), 2),
    "mass_mean": Method(mass_mean, Needs(scatter=True), 2),
    "lda": Method(lda, Needs(scatter=True), 3),
}


def scaled(direction: Tensor, difference: Tensor) -> Tensor:
    """Return a direction in the length that the means are apart along it, float64 [D] on the CPU."""
    wide = direction.double().cpu()
    axis: Tensor = wide / wide.norm()
    return axis * abs(float(axis @ difference.cpu()))


def _whitened(sums: Sums, covariance: Tensor, ridge: float) -> Tensor:
    """`(C + ridge I)^-1 (m+ - m-)`."""
    loaded = covariance.clone()
    loaded.diagonal().add_(max(ridge, torch.finfo(torch.float64).tiny))
    found: Tensor = torch.cholesky_solve(sums.difference[:, None], torch.linalg.cholesky(loaded))[:, 0]
    return found


def _first_axis(second: Floats, start: Floats) -> tuple[Floats, float]:
    """The eigenvector of the largest eigenvalue, and its share of the trace."""
    if len(second) > 512:
        from scipy.sparse.linalg import eigsh

        values, vectors = eigsh(second, k=1, v0=start)
    else:
        values, vectors = np.linalg.eigh(second)
    return np.ascontiguousarray(vectors[:, -1]), float(values[-1] / np.trace(second))
