"""Rounding that accumulates through many blocks passes at every one of them; a mistake in one of them does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from trimtab.compare import compare
from trimtab.results.comparison import Comparison

Write = Callable[..., Path]
ROWS, WIDTH = 48, 96


def run(depth: int, dtype: torch.dtype, seed: int, how: str = "", mistake: int | None = None) -> list[torch.Tensor]:
    """The residual stream behind every block of a stack, computed in a dtype."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=draw)
    if how == "massive channel":
        hidden[:, 5] += 900.0
    if how == "near-zero rows":
        hidden[::7] *= 1e-4
    hidden = hidden.to(dtype)
    found = []
    for layer in range(depth):
        up = (torch.randn(WIDTH, 2 * WIDTH, generator=draw) / WIDTH**0.5).to(dtype)
        down = (torch.randn(2 * WIDTH, WIDTH, generator=draw) / (2 * WIDTH) ** 0.5).to(dtype)
        wide = hidden.float()  # as models do: the squares of a massive channel leave the range of float16
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
        inner = functional.gelu(normed @ up)
        if how == "another order":  # the same sum, the second half first
            out = inner[:, WIDTH:] @ down[WIDTH:] + inner[:, :WIDTH] @ down[:WIDTH]
        else:
            out = inner @ down
        hidden = hidden + (out * 1.04 if layer == mistake else out)
        found.append(hidden)
    return found


def compared(write: Write, reference: list[torch.Tensor], candidate: list[torch.Tensor]) -> Comparison:
    paths = [
        write(name, [(f"layers.{layer}.resid_post", one, {"site": f"layers.{layer}.resid_post", "layer": layer})
                     for layer, one in enumerate(stream)])
        for name, stream in (("reference", reference), ("candidate", candidate))
    ]  # fmt: skip
    return compare(*paths)


@pytest.mark.parametrize("how", ["", "massive channel", "near-zero rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [4, 24])
def test_a_coarser_dtype_passes_behind_every_block(write: Write, depth: int, dtype: torch.dtype, how: str) -> None:
    for seed in range(2):
        write_here = lambda name, records, seed=seed: write(f"{name}{seed}", records)  # noqa: E731
        result = compared(write_here, run(depth, torch.float32, seed, how), run(depth, dtype, seed, how))
        assert result.passed and result.counts["passed"] == depth, result.reason


@pytest.mark.parametrize("depth", [4, 24])
def test_two_orders_of_summation_pass_behind_every_block(write: Write, depth: int) -> None:
    result = compared(write, run(depth, torch.float32, 0), run(depth, torch.float32, 0, "another order"))
    assert result.passed and result.counts["passed"] == depth, result.reason


@pytest.mark.parametrize("depth", [4, 24])
def test_a_mistake_beside_the_rounding_fails_from_its_block_on(write: Write, depth: int) -> None:
    """A block's output off by 4 %, where all of the candidate is in float32; nothing before it fails."""
    at = depth // 2
    result = compared(write, run(depth, torch.float32, 0), run(depth, torch.float32, 0, "another order", mistake=at))
    assert [one.status for one in result.records] == ["passed"] * at + ["failed"] * (depth - at)
    assert result.first_divergence is not None and result.first_divergence.key.site == f"layers.{at}.resid_post"
