"""Whole matrices of two models: Frobenius norms, cosine, and the spectrum of their difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import InputError

_OVERSAMPLE = 10
_PROBES = 10
_POWER_ITERATIONS = 2
_ERROR_ITERATIONS = 3
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """The leading singular values of a matrix, and how many directions it acts on."""

    singular_values: tuple[float, ...]
    """The largest, in falling order. Each is at most the true one, up to rounding."""
    error: float
    """Bound e: the true value lies within [s, sqrt(s^2 + e^2)], wrong for one seed in 10^10. 0 when exact."""
    effective_rank: float
    """Participation ratio (sum of s^2)^2 / (sum of s^4) over all singular values: r for r equal ones. 0 for a zero
    matrix."""
    effective_rank_error: float
    """Standard error of `effective_rank`: its tail beyond the leading values is estimated. 0 when exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixChange:
    """One matrix of two models."""

    base_norm: float
    """Frobenius norm."""
    tuned_norm: float
    change_norm: float
    """Frobenius norm of tuned - base."""
    cosine: float
    """Of the two as flat vectors; two zero matrices: 1, one: 0."""
    spectrum: Spectrum
    """Of tuned - base."""

    @property
    def relative_change(self) -> float:
        """`change_norm / base_norm`; infinite when only the base is zero, 0 when nothing changed."""
        if self.change_norm == 0:
            return 0.0
        return self.change_norm / self.base_norm if self.base_norm else math.inf


def compare_matrices(
    base: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"], *, rank: int = 32, seed: int = 0
) -> MatrixChange:
    """Compare two matrices of one shape; a norm's weight may be given as a vector.

    Args:
        base: any float dtype.
        tuned: the same shape.
        rank: singular values of the difference that are wanted.
        seed: of the randomised spectrum.

    Raises:
        InputError: the shapes differ.
    """
    if base.shape != tuned.shape:
        raise InputError(f"matrices of shape {list(base.shape)} and {list(tuned.shape)}; one shape was expected")
    base_square, tuned_square, inner = _sums(base, tuned)
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    change = tuned.to(wide) - base.to(wide)
    change_norm = frobenius(change)
    cosine = inner / math.sqrt(base_square * tuned_square) if base_square and tuned_square else 0.0
    return MatrixChange(
        base_norm=math.sqrt(base_square),
        tuned_norm=math.sqrt(tuned_square),
        change_norm=change_norm,
        cosine=1.0 if base_square == tuned_square == 0 else max(-1.0, min(1.0, cosine)),
        spectrum=_spectrum(change.reshape(len(change), -1), change_norm, rank, seed),
    )


def frobenius(matrix: Tensor) -> float:
    """Return the Frobenius norm, accumulated in float64."""
    pieces = torch.split(matrix.reshape(-1), _CHUNK)
    return math.sqrt(sum(torch.linalg.vector_norm(piece, dtype=torch.float64).square().item() for piece in pieces))


def _sums(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Return |a|^2, |b|^2 and <a, b> in float64, a piece at a time."""
    totals = torch.zeros(3, dtype=torch.float64)
    pieces = (torch.split(flat.reshape(-1), _CHUNK) for flat in (a, b))
    for one, other in zip(*pieces, strict=True):
        x, y = one.to(torch.float64), other.to(torch.float64)
        totals += torch.stack((x @ x, y @ y, x @ y)).cpu()
    first, second, inner = totals.tolist()
    return first, second, inner


def spectrum(matrix: Float[Tensor, "out in"], *, rank: int = 32, seed: int = 0) -> Spectrum:
    """Return the leading singular values of a matrix by a randomised range finder, with their error.

    Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.1 with two power iterations and 10 extra directions; the
    error is their bound (4.3) with 10 probes, sharpened by three power iterations on what was missed. Small matrices
    are decomposed exactly.

    Args:
        matrix: float32 or float64, in which the products are computed.
        rank: singular values wanted.
        seed: of the random directions.

    Raises:
        InputError: the rank is not positive.
    """
    return _spectrum(matrix, frobenius(matrix), rank, seed)


def _spectrum(matrix: Tensor, norm: float, rank: int, seed: int) -> Spectrum:
    """Decompose a matrix of known Frobenius norm."""
    if rank < 1:
        raise InputError(f"rank {rank}; 1 or more singular values were expected")
    width = rank + _OVERSAMPLE
    if norm == 0:
        return _exact(torch.zeros(min(rank, *matrix.shape), dtype=torch.float64), rank)
    if min(matrix.shape) <= 2 * width:
        return _exact(torch.linalg.svdvals(matrix.to(torch.float64)), rank)
    generator = torch.Generator().manual_seed(seed)
    basis = _range(matrix, width, generator)
    small = basis.T @ matrix
    values = torch.linalg.svdvals(small.to(torch.float64))
    probes = torch.randn(matrix.shape[1], _PROBES, generator=generator).to(matrix)
    missed = _outside(basis, matrix @ probes)
    fourth, deviation = _fourth_power(matrix, basis, small, values, missed)
    effective = norm**4 / fourth
    return Spectrum(
        singular_values=tuple(values[:rank].tolist()),
        error=_error(matrix, basis, small, missed),
        effective_rank=effective,
        effective_rank_error=effective * deviation / fourth,
    )


def _exact(values: Tensor, rank: int) -> Spectrum:
    fourth = values.pow(4).sum().item()
    effective = values.square().sum().item() ** 2 / fourth if fourth else 0.0
    return Spectrum(
        singular_values=tuple(values[:rank].tolist()), error=0.0, effective_rank=effective, effective_rank_error=0.0
    )


def _range(matrix: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Return an orthonormal basis, [out, width], of what the matrix mostly maps to."""
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis: Tensor = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis


def _outside(basis: Tensor, columns: Tensor) -> Tensor:
    return columns - basis @ (basis.T @ columns)


def _error(matrix: Tensor, basis: Tensor, small: Tensor, missed: Tensor) -> float:
    """Bound the spectral norm of R = A - Q B, given R w for Gaussian w.

    With M = (R R^T)^3 R it is |R|^7 = |M| <= 10 sqrt(2 / pi) max |M w|, wrong with probability 10^-10.
    """
    scale = torch.linalg.vector_norm(missed.to(torch.float64), dim=0).max().item()
    if scale == 0:
        return 0.0
    powered, log_scale = missed / scale, math.log(scale)
    for _ in range(_ERROR_ITERATIONS):
        back = matrix.T @ powered - small.T @ (basis.T @ powered)
        powered = _outside(basis, matrix @ back)
        scale = torch.linalg.vector_norm(powered.to(torch.float64), dim=0).max().item()
        if scale == 0:
            return 0.0
        powered, log_scale = powered / scale, log_scale + math.log(scale)
    return math.exp((math.log(10 * math.sqrt(2 / math.pi)) + log_scale) / (2 * _ERROR_ITERATIONS + 1))


def _fourth_power(matrix: Tensor, basis: Tensor, small: Tensor, values: Tensor, missed: Tensor) -> tuple[float, float]:
    """Return the sum of the fourth powers of all singular values, and its standard error.

    With A = Q B + R and Q^T R = 0 it is |B B^T|^2 + 2 |R B^T|^2 + |R^T R|^2; only the last term is estimated, by the
    mean of |R^T R w|^2 over Gaussian w (Hutchinson).
    """
    across = _outside(basis, matrix @ small.T).to(torch.float64).square().sum().item()
    back = matrix.T @ missed
    samples = (back - small.T @ (basis.T @ missed)).to(torch.float64).square().sum(0)
    exact = values.pow(4).sum().item() + 2 * across
    return exact + samples.mean().item(), samples.std().item() / math.sqrt(len(samples))
