"""What is trained: float32 parameters of one site, and the correction that they make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.steering import Add, LowRank, Op
from trimtab.vectors.train.config import TrainingConfig


class VectorMap(nn.Module):
    """`c = v`: one vector [d] in hidden units."""

    def __init__(self, width: int, config: TrainingConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.vector = nn.Parameter(config.init_scale * torch.randn(width, generator=generator))

    def forward(self, h: Tensor) -> Tensor:
        """Return the correction [d], the same for every row of `h`."""
        return self.vector

    def op(self) -> Op:
        """Return what it is as an op, float32."""
        return Add(self.vector.detach().cpu())

    def limit(self, max_norm: float) -> bool:
        """Scale the vector down to a norm; whether that changed it."""
        norm = float(self.vector.detach().norm())
        if norm > max_norm:
            self.vector.data.mul_(max_norm / norm)
        return norm > max_norm

    @property
    def norm(self) -> float:
        """Length of the vector."""
        return float(self.vector.detach().double().norm())


class LowRankMap(nn.Module):
    """`c = B (A h + b)`: A [r, d] begins as random orthonormal rows, b [r] and B [d, r] as zero."""

    def __init__(self, width: int, config: TrainingConfig, generator: torch.Generator) -> None:
        super().__init__()
        rows = torch.linalg.qr(torch.randn(width, config.rank, generator=generator)).Q.T
        self.A = nn.Parameter(rows.contiguous())
        self.b = nn.Parameter(torch.zeros(config.rank))
        self.B = nn.Parameter(config.init_scale * torch.randn(width, config.rank, generator=generator))

    def forward(self, h: Tensor) -> Tensor:
        """Return the correction of each row of `h` [..., d]."""
        return (h @ self.A.T + self.b) @ self.B.T

    def op(self) -> Op:
        """Return what it is as an op, float32."""
        return LowRank(self.A.detach().cpu(), self.b.detach().cpu(), self.B.detach().cpu())

    def limit(self, max_norm: float) -> bool:
        """Scale B down to a Frobenius norm; whether that changed it."""
        norm = self.norm
        if norm > max_norm:
            self.B.data.mul_(max_norm / norm)
        return norm > max_norm

    @property
    def norm(self) -> float:
        """Frobenius norm of B, since the rows of A begin with norm 1."""
        return float(self.B.detach().double().norm())


SiteMap = VectorMap | LowRankMap


def make_map(width: int, config: TrainingConfig, seed: Any) -> SiteMap:
    """Return the untrained map of one site."""
    generator = torch.Generator().manual_seed(seed)
    return (VectorMap if config.kind == "vector" else LowRankMap)(width, config, generator)
