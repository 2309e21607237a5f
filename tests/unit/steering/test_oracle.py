"""The oracle's rounding against torch's casts, so that it can be trusted below."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from steering_oracle import rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_agrees_with_casts_of_float32(dtype: torch.dtype) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 2000)
    ties = (torch.arange(256, 512).to(dtype).float() + 0.5) * 2.0**-4
    for value in torch.cat([values, ties]).tolist():
        assert float(rounded(Fraction(value), dtype)) == float(torch.tensor(value).to(dtype))
