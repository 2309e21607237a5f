"""Principal subspaces in float64, with a decomposition that does not give up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from trimtab.errors import InputError, VectorError

Matrix: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

RANK_TOLERANCE = 1e-10
"""Singular values at or under this fraction of the largest count as zero."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """Thin singular value decomposition of a matrix [n, d].

    Args:
        values: [r] singular values, descending.
        rows: [r, d] right singular vectors, orthonormal rows.
        route: which algorithm ended: "gesdd", "gesvd" or "eigh".
    """

    values: Matrix
    rows: Matrix
    route: str

    @property
    def rank(self) -> int:
        """Singular values above the tolerance."""
        return int((self.values > RANK_TOLERANCE * self.values[0]).sum()) if self.values[0] > 0 else 0

    @property
    def shares(self) -> Matrix:
        """[r] share of the sum of squares of each direction."""
        squares = self.values**2
        total = float(squares.sum())
        return squares / total if total > 0 else squares


def decompose(matrix: Matrix) -> Decomposition:
    """Decompose a finite float64 matrix by gesdd; where that fails by gesvd; where that fails by eigh of a Gram matrix.

    gesdd is the fast one and is known not to converge on some matrices. eigh squares the values, so that directions
    under 1e-8 of the largest are lost there; they are left out.
    """
    import scipy.linalg

    for route in ("gesdd", "gesvd"):
        try:
            _, values, rows = scipy.linalg.svd(matrix, full_matrices=False, lapack_driver=route)
        except np.linalg.LinAlgError:
            continue
        return Decomposition(values=values, rows=rows, route=route)
    return _by_eigenvectors(matrix)


def prepare(rows: Matrix, what: str, *, center: bool, normalise_rows: bool, least: int = 2) -> Matrix:
    """Return rows ready to be decomposed: finite float64, centred, each divided by its norm.

    Raises:
        InputError: fewer than `least` rows, or they are all the same.
        VectorError: they are not finite.
    """
    matrix = np.array(rows, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) < least:
        raise InputError(f"{what}: {len(matrix)} rows were collected; at least {least} are needed")
    bad = ~np.isfinite(matrix).all(axis=1)
    if bad.any():
        raise VectorError(f"{what}: row {int(bad.argmax())} of {len(matrix)} is not finite; collect it in float32")
    size = float(np.linalg.norm(matrix))
    if center:
        matrix -= matrix.mean(axis=0)
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    if not norms.max() > RANK_TOLERANCE * size:
        raise InputError(f"{what}: its {len(matrix)} rows are all the same, so they span nothing")
    if normalise_rows:
        matrix = np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > RANK_TOLERANCE * size)
    return matrix


def remove(vector: Matrix, basis: Matrix) -> Matrix:
    """Return `v - U^T U v` for orthonormal rows U [k, d]."""
    left: Matrix = vector - (vector @ basis.T) @ basis
    return left


def _by_eigenvectors(matrix: Matrix) -> Decomposition:
    wide = matrix.shape[0] < matrix.shape[1]
    values, vectors = np.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    order = np.argsort(values)[::-1]
    singular = np.sqrt(np.maximum(values[order], 0.0))
    kept = singular > 1e-8 * singular[0]
    rows = vectors[:, order].T[kept]
    if wide:
        rows = (rows @ matrix) / singular[kept, None]
    return Decomposition(values=singular[kept], rows=rows, route="eigh")
