"""Fingerprints of rows: factors of their own, sequences whose ends stay right, coarser noise, merged heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.compare import find_fingerprints

TOLERANCE = 2e-6


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(1))


def kinds(reference: Tensor, candidate: Tensor, tolerance: float = TOLERANCE) -> list[str]:
    return [one.kind for one in find_fingerprints(reference, candidate, tolerance=tolerance)]


def test_another_eps_is_a_factor_by_row(x: Tensor) -> None:
    x = x * torch.rand(3, 16, 1, generator=torch.Generator().manual_seed(2)) * 3

    def norm(eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    assert kinds(norm(1e-6), norm(1e-2))[0] == "row_scale"


def test_attention_leaves_the_first_token_and_a_mask_the_last(x: Tensor) -> None:
    scores = x @ x.mT
    causal = torch.ones(16, 16).triu(1).bool()

    def attend(scale: float, mask: Tensor) -> Tensor:
        return (scores * scale).masked_fill(mask, -torch.inf).softmax(-1) @ x

    assert kinds(attend(0.2, causal), attend(0.1, causal)) == ["attention"]
    assert kinds(attend(0.2, causal), attend(0.2, torch.ones(16, 16).triu(2).bool())) == ["mask_edge"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_input_leaves_noise_of_its_size(x: Tensor, dtype: torch.dtype) -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(3))
    found = find_fingerprints(x @ weight, x.to(dtype).float() @ weight, tolerance=TOLERANCE)
    assert found[0].kind == "coarse_arithmetic" and str(dtype).removeprefix("torch.") in found[0].detail


def test_noise_of_another_size_or_in_some_rows_is_no_cast(x: Tensor) -> None:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    assert kinds(x, x + 0.1 * noise) == []
    some = torch.zeros(3, 16, 1)
    some[:, ::5] = 1
    assert "coarse_arithmetic" not in kinds(x, x + 0.003 * noise * some)


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_heads_merged_in_the_wrong_order_are_a_transpose(x: Tensor, heads: int) -> None:
    split = x.unflatten(-1, (heads, -1))
    found = find_fingerprints(x, split.transpose(1, 2).reshape(x.shape), tolerance=TOLERANCE)
    assert found[0].kind == "transpose" and found[0].value == heads
    back = x.reshape(3, heads, 16, -1).transpose(1, 2).reshape(x.shape)
    assert kinds(x, back)[0] == "transpose"


@pytest.mark.parametrize("shift", [1, -2])
def test_rows_are_moved_along_each_sequence(x: Tensor, shift: int) -> None:
    found = find_fingerprints(x, x.roll(shift, dims=1), tolerance=TOLERANCE)
    assert (found[0].kind, found[0].value) == ("shift", shift)
