"""Numbers about tensors: dtypes, one-pass statistics, pairwise comparison, ULP distance, quantiles, tolerances.

Importing this package costs nothing beyond torch; the compiled passes load at their first use.
"""

from __future__ import annotations

from trimtab.numerics import dtypes, metrics, moments, pair, quantiles, rounding, tolerances, ulp
from trimtab.numerics.dtypes import coarser, dtype_name, is_floating, resolve_dtype, round_to, unit_roundoff
from trimtab.numerics.moments import Moments, TensorStatistics, tensor_statistics
from trimtab.numerics.pair import PairStats, compare_pair, compare_pair_coarser
from trimtab.numerics.quantiles import QuantileSketch
from trimtab.numerics.rounding import expected_relative_error
from trimtab.numerics.ulp import max_ulp, ulp_distance

__all__ = [
    "Moments",
    "PairStats",
    "QuantileSketch",
    "TensorStatistics",
    "coarser",
    "compare_pair",
    "compare_pair_coarser",
    "dtype_name",
    "dtypes",
    "expected_relative_error",
    "is_floating",
    "max_ulp",
    "metrics",
    "moments",
    "pair",
    "quantiles",
    "resolve_dtype",
    "round_to",
    "rounding",
    "tensor_statistics",
    "tolerances",
    "ulp",
    "ulp_distance",
    "unit_roundoff",
]
