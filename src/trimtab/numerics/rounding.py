"""How large a difference rounding alone explains."""

from __future__ import annotations

import math

import torch

from trimtab.errors import InputError
from trimtab.numerics.dtypes import unit_roundoff

RMS_FACTOR = 0.42
"""Root-mean-square relative error of one rounding to nearest, in units of the unit roundoff.

The error is uniform in [-u, u] for a significand in [1, 2) (variance u^2/3); relative to a log-uniform significand m
it is `sqrt(E[1/m^2] / 3) = sqrt(0.375 / ln 2 / 3) = 0.4247`, and weighted by energy (as in a norm ratio)
`sqrt(1 / (3 E[m^2])) = sqrt(ln 2 / 4.5) = 0.3925`. 0.42 covers both within 8 %.
"""


def expected_relative_error(
    dtype: str | torch.dtype,
    *,
    blocks_upstream: int = 0,
    accumulator: str | torch.dtype = torch.float32,
    reduction_length: int,
) -> float:
    """Return the relative L2 error of a row that rounding alone is expected to make.

    `e^2 = (0.42 u_d)^2 (1 + 2 l) + (0.42 u_acc)^2 K`. The first term is one rounding of the result plus two per
    transformer block upstream (attention and MLP each add to the residual stream once), taken as independent. The
    second is the random walk of a sum of K products in the accumulator (probabilistic error analysis: Higham and
    Mary, SIAM J. Sci. Comput. 41, 2019: the error of a sum grows like sqrt(K) u, not K u).

    Args:
        dtype: storage dtype, the coarser of two compared sides.
        blocks_upstream: l, transformer blocks in that dtype before this tensor; 0 when not known.
        accumulator: dtype in which dot products accumulate.
        reduction_length: K, terms of the dot product that made an element (the hidden size, usually).

    Returns:
        Relative error, no unit.

    Raises:
        InputError: for negative counts or a dtype that is not floating.
    """
    if blocks_upstream < 0 or reduction_length < 0:
        raise InputError(
            f"got blocks_upstream={blocks_upstream}, reduction_length={reduction_length}; expected counts >= 0"
        )
    storage = RMS_FACTOR * unit_roundoff(dtype)
    accumulate = RMS_FACTOR * unit_roundoff(accumulator)
    return math.sqrt(storage**2 * (1 + 2 * blocks_upstream) + accumulate**2 * reduction_length)
