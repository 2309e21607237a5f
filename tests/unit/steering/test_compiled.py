"""torch.compile: the corrections of a compiled graph are those of eager mode, bit for bit, in every math dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.steering import Ablate, Add, Cap, CapSubspace, SiteProgram, Steering

# inductor's own imports use deprecated parts of torch
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

WIDTH = 48
COMBINATIONS = [
    (math, dtype) for math in ("float32", "bfloat16", "float16") for dtype in ("float32", "bfloat16", "float16")
]


def program(math: Any) -> SiteProgram:
    v = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    ops = [
        Cap(v[0], max=0.5, math=math),
        Add(v[1], 0.3, unit="token_norm", math=math),
        Ablate(v[2], 0.1, math=math, max_ratio=0.3),
        CapSubspace(v[2:], max=0.2, math=math),
    ]
    (site,) = Steering({"embed": ops}, positions="generated").resolve(num_layers=1, hidden_size=WIDTH).values()
    return site


def compare(math: str, dtype: torch.dtype) -> None:
    site = program(math)
    positions = torch.arange(9)

    def block(x: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        applied = site.apply(x * 1.5, positions=where, prompt_length=4)
        return applied.h * 2.0, torch.stack([torch.as_tensor(dose.rows) for dose in applied.dose])

    torch.compiler.reset()
    h = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    eager, counts = block(h, positions)
    compiled, graph_counts = torch.compile(block, fullgraph=True)(h, positions)
    assert torch.equal(compiled, eager)
    assert counts.tolist() == graph_counts.tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("math", ["float32", "bfloat16", "float16"])
def test_compiled_corrections_are_bit_equal(math: str) -> None:
    compare(math, torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize(("math", "dtype"), COMBINATIONS)
def test_compiled_corrections_are_bit_equal_in_every_model_dtype(math: str, dtype: str) -> None:
    compare(math, getattr(torch, dtype))


@pytest.mark.full
def test_inductor_alone_would_drop_the_roundings() -> None:
    """Why the operator is opaque: the same arithmetic, traced, keeps float32 between operations."""
    u = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()

    def traced(x: torch.Tensor) -> torch.Tensor:
        p = (x.float() * u.float()).sum(-1, keepdim=True).bfloat16()
        return (p.clamp(max=0.5) - p) * u + x

    h = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert not torch.equal(torch.compile(traced, fullgraph=True)(h), traced(h))


@pytest.mark.full
def test_a_full_dose_leaves_the_graph() -> None:
    site = program("float32")
    h = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))

    def block(x: torch.Tensor) -> torch.Tensor:
        return site.apply(x, positions=torch.arange(9), prompt_length=4, detail="full").dose[0].p_before

    assert torch.equal(torch.compile(block, backend="eager")(h), block(h))
