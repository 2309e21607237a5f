"""Statistics of one record, as columns."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import InputError
from trimtab.numerics import tensor_statistics

UNMEASURED = (None, None, None, None, None)


def measure(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return mean, std, absmax, nan_count, inf_count; None for what a tensor without numbers does not have."""
    try:
        found = tensor_statistics(tensor)
    except InputError:  # bits and sub-byte dtypes hold no numbers that torch can read
        return UNMEASURED
    if found.mean != found.mean:
        return (None, None, None, found.nan_count, found.inf_count)
    return (found.mean, found.std, found.absmax, found.nan_count, found.inf_count)
