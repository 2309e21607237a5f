"""Contamination: what vectors share for reasons other than their concepts, as a subspace to remove.

Two sources, at the site of the vectors:

- **neutral** states: pooled states of texts that have nothing to do with the concepts. How many of their principal
  directions are more than noise is decided by a permutation test.
- **concepts**: the vectors themselves, as published. Centring n vectors leaves n - 1 dimensions, which hold all that
  tells them apart: removing k >= n - 1 of them makes all cleaned vectors the same. So k <= n - 2, unless the published
  setting is asked for, and then the result says what became of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trimtab.errors import InputError
from trimtab.vectors.clean.accuracy import accuracy
from trimtab.vectors.clean.linear import Decomposition, Matrix, decompose, prepare, remove


@dataclass(frozen=True, kw_only=True, eq=False)
class Contamination:
    """A subspace to remove.

    Args:
        basis: [k, d] float64, orthonormal rows.
        n: rows that it was estimated from.
        shares: [k], share of their variance along each direction.
        p_values: of the leading directions, when a permutation test chose k; the last one is the first that failed.
        route: which decomposition ended.
        degeneracy: what is wrong with the published setting; empty when nothing is.
    """

    basis: Matrix
    n: int
    shares: Matrix
    p_values: tuple[float, ...] = ()
    route: str = "gesdd"
    degeneracy: str = ""

    @property
    def k(self) -> int:
        """Directions that are removed."""
        return len(self.basis)

    @property
    def share(self) -> float:
        """Share of the variance of its rows that lies in it."""
        return float(self.shares.sum())

    def first(self, k: int) -> Contamination:
        """Return the subspace of the first k directions."""
        return replace(self, basis=self.basis[:k], shares=self.shares[:k])


def from_concepts(
    vectors: Matrix, k: int | None = None, *, normalise_rows: bool = True, published: bool = False
) -> Contamination:
    """Return the leading directions in which the vectors themselves differ.

    Args:
        vectors: [n, d], one per concept.
        k: directions; None takes 1, or n as published.
        normalise_rows: divide each centred vector by its norm first.
        published: allow k up to n.

    Raises:
        InputError: k out of range; says which k would do.
    """
    n = len(vectors)
    chosen = k if k is not None else n if published else 1
    most = min(n, vectors.shape[1]) if published else n - 2
    if most < 1:
        raise InputError(
            f"contamination from {n} vectors: at least 3 are needed, because k <= n - 2; use neutral texts instead"
        )
    if not 1 <= chosen <= most:
        why = (
            f"k from 1 to {most} was expected"
            if published or chosen < 1
            else f"{n} centred vectors have rank {n - 1}, and removing k >= {n - 1} of them makes all cleaned vectors "
            f"the same; k <= {most} was expected, or the published setting (--published)"
        )
        raise InputError(f"contamination from {n} vectors: k={chosen} was given; {why}")
    matrix = prepare(vectors, "contamination from vectors", center=True, normalise_rows=normalise_rows)
    found = decompose(matrix)
    made = _of(found, chosen, n)
    if chosen <= n - 2:
        return made
    return replace(made, degeneracy=_degeneracy(vectors, made, found.rank))


def from_neutral(
    states: Matrix,
    k: int | None = None,
    *,
    normalise_rows: bool = False,
    permutations: int = 99,
    alpha: float = 0.05,
    seed: int = 0,
) -> Contamination:
    """Return the leading directions of neutral states.

    Without k, directions are accepted one after another as long as each carries more variance than chance: the columns
    of what is left are permuted independently, which keeps every coordinate's variance and destroys what they share,
    and p = (1 + #{largest singular value of a permutation >= observed}) / (1 + permutations) must be at most alpha
    (parallel analysis; Horn 1965, Buja and Eyuboglu 1992). At most n // 8 are accepted.
    States of a language model are correlated throughout, so that the test says what is more than noise, not what is
    contamination: what removing it costs is measured with data of the vectors.

    Args:
        states: [n, d], one pooled state per text.
        k: directions; None lets the test choose, which may be none.
        normalise_rows: divide each centred state by its norm first.
        permutations: of the test.
        alpha: of the test.
        seed: of the test.

    Raises:
        InputError: k out of range, or too few states.
    """
    matrix = prepare(states, "neutral states", center=True, normalise_rows=normalise_rows, least=8)
    n, found = len(matrix), decompose(matrix)
    most = min(n // 8, found.rank)
    if k is not None:
        if not 1 <= k <= most:
            raise InputError(
                f"neutral states: k={k} was given; with {n} states of rank {found.rank}, k from 1 to {most} was "
                "expected (an eighth of the states): give more neutral texts or a smaller k"
            )
        return _of(found, k, n)
    if not 0 < alpha < 1 or permutations < 1 / alpha - 1:
        raise InputError(f"alpha={alpha} needs at least {max(1, int(np.ceil(1 / alpha)) - 1)} permutations")
    p_values = _permutation_test(matrix, found, most, permutations, alpha, seed)
    accepted = sum(p <= alpha for p in p_values)
    return replace(_of(found, accepted, n), p_values=p_values)


def keep_accurate(
    found: Contamination, vectors: Sequence[tuple[Matrix, tuple[Matrix, Matrix]]], max_loss: float
) -> Contamination:
    """Return the leading directions before the first one that costs a vector more than `max_loss` of its accuracy.

    Args:
        found: the subspace.
        vectors: vector [d] and the positive and negative states [n, d] that it is to tell apart.
        max_loss: balanced accuracy that may be lost.
    """
    before = [accuracy(vector, states, states) for vector, states in vectors]
    for k in range(1, found.k + 1):
        after = [accuracy(remove(vector, found.basis[:k]), states, states) for vector, states in vectors]
        if max(old - new for old, new in zip(before, after, strict=True)) > max_loss:
            return found.first(k - 1)
    return found


def pairwise_cosines(vectors: Matrix) -> Matrix:
    """Return the cosines of all pairs of rows: [n (n - 1) / 2]."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Matrix = (units @ units.T)[np.triu_indices(len(vectors), 1)]
    return found


def _of(found: Decomposition, k: int, n: int) -> Contamination:
    return Contamination(basis=found.rows[:k], n=n, shares=found.shares[:k], route=found.route)


def _degeneracy(vectors: Matrix, made: Contamination, rank: int) -> str:
    cleaned = np.stack([remove(one, made.basis) for one in vectors])
    norms = np.linalg.norm(cleaned, axis=1) / np.linalg.norm(vectors, axis=1)
    alone = f" and {made.k - rank} of them arbitrary" if made.k > rank else ""
    if norms.min() < 1e-6:
        return f"k={made.k} of {made.n} vectors{alone}: what is left is rounding noise ({norms.min():.1e} of the norm)"
    cosine = float(pairwise_cosines(cleaned).min())
    return (
        f"k={made.k} removes all {made.n - 1} dimensions that tell {made.n} vectors apart{alone}: the cosine of any "
        f"two cleaned vectors is at least {cosine:.9f}, so all of them steer alike"
    )


def _permutation_test(
    matrix: Matrix, found: Decomposition, most: int, permutations: int, alpha: float, seed: int
) -> tuple[float, ...]:
    source = np.random.default_rng(seed)
    left, p_values = matrix, []
    for index in range(most):
        observed = found.values[index] ** 2
        above = sum(_largest(source.permuted(left, axis=0)) >= observed for _ in range(permutations))
        p_values.append(float((1 + above) / (1 + permutations)))
        if p_values[-1] > alpha:
            break
        left = remove(left, found.rows[index : index + 1])
    return tuple(p_values)


def _largest(matrix: Matrix) -> float:
    """The largest squared singular value, by the smaller Gram matrix."""
    centred = matrix - matrix.mean(axis=0)
    gram = centred @ centred.T if matrix.shape[0] < matrix.shape[1] else centred.T @ centred
    return float(np.linalg.eigvalsh(gram)[-1])
