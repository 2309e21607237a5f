"""Task manifold: where the states of a concept live, and how much of a vector lies there.

Estimated from unsteered states of texts about the concept, at the site of the vector. With eigenvalues s_i of their
covariance along directions b_i, a vector becomes `sum_i w_i <v, b_i> b_i`:

- hard: w_i = 1 for the first m directions, else 0;
- ridge: w_i = s_i / (s_i + ridge), which shrinks rare directions and cuts none.

m is chosen by cross-validation, as the number of components of the probabilistic PCA (Tipping and Bishop 1999) under
which held-out states are most likely; the ridge is the noise variance of that model unless it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.errors import InputError
from trimtab.vectors.clean.linear import Decomposition, Matrix, decompose, prepare

Kind = Literal["hard", "ridge"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifold:
    """Directions with their weights.

    Args:
        basis: [r, d] float64, orthonormal rows.
        weights: [r], from 0 to 1.
        n: states that it was estimated from.
        m: directions of the probabilistic model.
        ridge: variance, in squared hidden units, at which a direction is halved; 0 for a hard projector.
        route: which decomposition ended.
    """

    basis: Matrix
    weights: Matrix
    n: int
    m: int
    ridge: float
    route: str = "gesdd"

    def project(self, vector: Matrix) -> Matrix:
        """Return the weighted projection of a vector [d]."""
        found: Matrix = ((self.basis @ vector) * self.weights) @ self.basis
        return found


def task_manifold(
    states: Matrix,
    what: str,
    *,
    kind: Kind = "ridge",
    m: int | None = None,
    ridge: float | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Manifold:
    """Estimate the manifold.

    Args:
        states: [n, d], one pooled state per text.
        what: concept and site, for messages.
        kind: hard or soft.
        m: directions; None chooses by cross-validation.
        ridge: for the soft one; None takes the noise variance.
        folds: of the cross-validation.
        seed: of its parts.

    Raises:
        InputError: too few states, an m that they cannot carry, or no direction that is more than noise.
    """
    matrix = prepare(states, what, center=True, normalise_rows=False, least=4)
    n, found = len(matrix), decompose(matrix)
    if ridge is not None and not (np.isfinite(ridge) and ridge > 0 and kind == "ridge"):
        raise InputError(
            f"{what}: ridge={ridge} with a {kind} manifold; a number above 0 was expected, with kind='ridge'"
        )
    chosen = choose_dimension(states, what, folds=folds, seed=seed) if m is None else m
    if not 1 <= chosen <= found.rank - 1:
        said = "cross-validation finds no direction that is more than noise" if m is None else f"m={m} was given"
        raise InputError(
            f"{what}: {said}; with {n} states of rank {found.rank}, m from 1 to {found.rank - 1} was expected: give "
            "more texts"
        )
    variances = found.values[: found.rank] ** 2 / (n - 1)
    if kind == "hard":
        return Manifold(basis=found.rows[:chosen], weights=np.ones(chosen), n=n, m=chosen, ridge=0.0, route=found.route)
    at = ridge if ridge is not None else _noise(variances, matrix.shape[1], chosen)
    basis, weights = found.rows[: found.rank], variances / (variances + at)
    return Manifold(basis=basis, weights=weights, n=n, m=chosen, ridge=float(at), route=found.route)


def choose_dimension(states: Matrix, what: str, *, folds: int = 5, seed: int = 0) -> int:
    """Return the number of components under which held-out states are most likely; 0 when noise explains them best.

    Raises:
        InputError: fewer than two folds, or fewer states than twice the folds.
    """
    n = len(states)
    if folds < 2 or n < 2 * folds:
        raise InputError(f"{what}: {n} states cannot be split into {folds} folds; {2 * max(folds, 2)} are needed")
    order = np.random.default_rng(seed).permutation(n)
    parts = np.array_split(order, folds)
    totals: list[Matrix] = []
    for part in parts:
        train = np.delete(states, part, axis=0).astype(np.float64)
        mean = train.mean(axis=0)
        totals.append(_likelihoods(decompose(train - mean), len(train), states[part] - mean))
    width = min(map(len, totals))
    return int(np.sum([one[:width] for one in totals], axis=0).argmax())


def _likelihoods(found: Decomposition, n: int, held: Matrix) -> Matrix:
    """Return the log-likelihood of centred held-out states for m = 0, 1, ... components, constants left out."""
    width, rank = held.shape[1], found.rank
    variances = found.values[:rank] ** 2 / (n - 1)
    counts = np.arange(rank)  # m < rank: some variance must be left for the noise
    noise = np.array([_noise(variances, width, int(m)) for m in counts])
    along = (held @ found.rows[:rank].T) ** 2
    first = np.concatenate([[0.0], np.cumsum(np.log(variances))])[:rank]
    inside = np.concatenate([np.zeros((len(held), 1)), np.cumsum(along / variances, axis=1)], axis=1)[:, :rank]
    explained = np.concatenate([np.zeros((len(held), 1)), np.cumsum(along, axis=1)], axis=1)[:, :rank]
    outside = (np.sum(held**2, axis=1, keepdims=True) - explained) / noise
    total: Matrix = -0.5 * np.sum(first + (width - counts) * np.log(noise) + inside + outside, axis=0)
    return total


def _noise(variances: Matrix, width: int, m: int) -> float:
    return float(variances[m:].sum() / (width - m))
