"""Quantiles against numpy, and what the sketch promises: its error, its exact values, its merge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trimtab.errors import InputError
from trimtab.numerics import QuantileSketch
from trimtab.numerics import quantiles as module
from trimtab.numerics.quantiles import RELATIVE_ERROR, quantiles

SHARES = [0.0, 0.001, 0.25, 0.5, 0.75, 0.999, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_exact_and_sketched_against_numpy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 700)
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(41, 53, generator=generator) * 10).exp().clamp(max=6e4).to(dtype)
    tensor[::2] *= -1
    expected = np.quantile(tensor.double().numpy(), SHARES, method="inverted_cdf")
    assert list(quantiles(tensor, SHARES)) == list(expected)
    sketch = QuantileSketch.of(tensor)
    assert sketch.count == tensor.numel()
    assert np.all(np.abs(sketch.quantiles(SHARES) - expected) <= RELATIVE_ERROR * np.abs(expected) * (1 + 1e-12))
    assert (sketch.least, sketch.greatest) == (float(tensor.min()), float(tensor.max()))
    assert list(sketch.quantiles([0.0, 1.0])) == pytest.approx([sketch.least, sketch.greatest], rel=RELATIVE_ERROR)


def test_merging_is_counting_all_at_once() -> None:
    parts = [torch.randn(100, generator=torch.Generator().manual_seed(i)) * 10.0**i for i in range(3)]
    a, b, c = (QuantileSketch.of(part) for part in parts)
    whole = QuantileSketch.of(torch.cat(parts))
    for merged in (a.merge(b).merge(c), c.merge(a.merge(b)), b.merge(c).merge(a).merge(QuantileSketch())):
        assert np.array_equal(merged.keys, whole.keys) and np.array_equal(merged.counts, whole.counts)
        assert (merged.least, merged.greatest) == (whole.least, whole.greatest)


def test_zero_infinity_and_nan() -> None:
    tensor = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 0.0, math.nan, math.inf])
    for found in (quantiles(tensor, [0, 0.5, 1]), QuantileSketch.of(tensor).quantiles([0, 0.5, 1])):
        assert list(found) == [-math.inf, 0.0, math.inf]
    assert QuantileSketch.of(tensor).count == 6
    for nothing in (torch.zeros(0), torch.tensor([math.nan])):
        assert np.isnan(quantiles(nothing, [0.5])).all() and np.isnan(QuantileSketch.of(nothing).quantiles([0.5])).all()
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        quantiles(torch.zeros(3), [1.5])
