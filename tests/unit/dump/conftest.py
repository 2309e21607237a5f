"""Parts that the tests of the dumper share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.trace import Trace


class Block(nn.Module):
    """Two linear maps and a residual; in recomputed form when asked for."""

    def __init__(self, width: int, checkpoint: str) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.checkpoint = checkpoint

    def body(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpoint:
            return x + self.body(x)
        from torch.utils.checkpoint import checkpoint

        return x + checkpoint(self.body, x, use_reentrant=self.checkpoint == "reentrant")


class Net(nn.Module):
    """A small model with a list of blocks, a buffer, and a dict as output."""

    def __init__(self, width: int = 4, layers: int = 2, checkpoint: str = "") -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList([Block(width, checkpoint) for _ in range(layers)])
        self.head = nn.Linear(width, 2)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, kind: str = "plain") -> dict[str, Tensor]:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return {"logits": self.head(hidden) * self.scale, "hidden": hidden}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, micro: int = 1, session: Any = None) -> None:
    """Train on seeded noise."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(micro):
            model(torch.randn(5, 3, generator=generator))["logits"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            session.step()


@pytest.fixture
def net() -> Callable[..., Net]:
    """Make a seeded model."""

    def make(**options: Any) -> Net:
        torch.manual_seed(0)
        return Net(**options)

    return make


@pytest.fixture
def records() -> Callable[..., list[dict[str, Any]]]:
    """Read the rows of a trace that have the given columns."""

    def read(path: Path | str, **columns: Any) -> list[dict[str, Any]]:
        return Trace.open(path, incomplete_ok=False).filter(**columns).index.to_dicts()

    return read
