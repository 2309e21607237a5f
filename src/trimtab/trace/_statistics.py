"""Statistics of one record."""

from __future__ import annotations

from typing import Any

import torch


def measure(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return mean, std, absmax, nan_count, inf_count; all None for an empty tensor."""
    if not tensor.numel():
        return (None, None, None, None, None)
    values = tensor.abs().double() if tensor.is_complex() else tensor.double()
    finite = torch.isfinite(values)
    nans = int(torch.isnan(values).sum())
    kept = values[finite]
    if not kept.numel():
        return (None, None, None, nans, tensor.numel() - nans)
    std, mean = torch.std_mean(kept, correction=0)
    return (float(mean), float(std), float(kept.abs().max()), nans, int((~finite).sum()) - nans)
