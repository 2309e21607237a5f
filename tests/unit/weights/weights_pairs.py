"""A tiny base model and what was made of it, for the tests of the three analyses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from trimtab.testing.models import tiny
from trimtab.weights import DirectionSet

WIDTH = 64


def saved_pair(
    folder: Path, change: Callable[[nn.Module], None], family: str = "llama", layers: int = 3
) -> tuple[Path, Path]:
    """Save a tiny model, change it, and save it again."""
    model = tiny(family, layers=layers)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def noisy(model: nn.Module) -> None:
    """Move every weight a little."""
    source = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=source)


def vectors(count: int, *, seed: int = 0, width: int = WIDTH) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, width, generator=source) * 3)


def directions(roles: int = 10, traits: int = 10, components: int = 4) -> DirectionSet:
    """Roles and traits of one and the same name, and principal components."""
    rows = vectors(roles + traits + components)
    found = DirectionSet.of([(f"d{i}", row) for i, row in enumerate(rows[:roles])], kind="role")
    found += DirectionSet.of([(f"d{i}", row) for i, row in enumerate(rows[roles : roles + traits])], kind="trait")
    if components:
        named = [(f"PC{i + 1}", row) for i, row in enumerate(rows[roles + traits :])]
        variance = [0.4, 0.3, 0.1, 0.05][:components]
        found += DirectionSet.of(named, kind="pc", variance=variance)
    return found
