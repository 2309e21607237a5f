"""Looks at one SAE between steps: the held-out tokens, and the statistics of parameters, gradients and densities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.results.sae import SAECheck
from trimtab.sae.learner import Learner
from trimtab.sae.parallel import Parallel

_ROWS = 1024
_NEVER = 1e-10  # where a latent that never fired stands in a histogram of log10 densities


class Look(NamedTuple):
    """What a look saw."""

    check: SAECheck
    statistics: dict[str, float]
    histograms: dict[str, Tensor]


def look(
    sae: str,
    learner: Learner,
    x: Tensor,
    target: Tensor | None,
    *,
    step: int,
    batch: int,
    histograms: bool,
    parallel: Parallel,
) -> Look:
    """Measure one SAE on the held-out tokens; nothing of it moves.

    Args:
        sae: its name.
        learner: the SAE in training.
        x: held-out activations, float32 [rows, d_in].
        target: what a transcoder reconstructs, float32 [rows, d_out].
        step: steps taken.
        batch: rows whose gradient is taken.
        histograms: whether tensors for histograms are wanted.
        parallel: the processes that share the SAE.
    """
    check, density = _check(sae, learner, x, target, step, parallel)
    statistics: dict[str, float] = {}
    shown: dict[str, Tensor] = {}
    gradients = parallel.gradients(learner, x[:batch], None if target is None else target[:batch])
    for prefix, tensors in (("", parallel.parameters(learner)), ("grad_", gradients)):
        for name, one in tensors.items():
            wide = one.detach().double()
            statistics[f"{prefix}norm/{name}"] = float(wide.norm())
            statistics[f"{prefix}mean/{name}"] = float(wide.mean())
            if histograms:
                shown[f"{prefix or 'parameter_'}values/{name}"] = one.detach().float().cpu()
    logs = density.clamp(min=_NEVER).log10()
    for share in (0.05, 0.5, 0.95):
        statistics[f"log10_density/{share:g}"] = float(logs.quantile(share))
    if histograms:
        shown["log10_density"] = logs.float()
    return Look(check, statistics, shown)


def _check(
    sae: str, learner: Learner, x: Tensor, target: Tensor | None, step: int, parallel: Parallel
) -> tuple[SAECheck, Tensor]:
    """Return FVU (global mean), L0 and dead share, and the density of each latent, float64 [d_sae]."""
    wanted = x if target is None else target
    mean = wanted.double().mean(dim=0)
    error = variation = 0.0
    fired = torch.zeros(learner.own.stop - learner.own.start, dtype=torch.float64)
    for rows, goal in _parts(x, wanted):
        found = learner.reconstruct(rows).double().cpu()
        error += float((found - goal.double()).square().sum())
        variation += float((goal.double() - mean).square().sum())
        fired += (learner.latents(rows) > 0).sum(dim=0).double().cpu()
    fired = parallel.gather(fired)
    density = fired / len(x)
    check = SAECheck(
        sae=sae,
        step=step,
        tokens=len(x),
        fvu=error / variation,
        l0=float(density.sum()),
        dead=float((fired == 0).double().mean()),
    )
    return check, density


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(torch.split(one, _ROWS) for one in tensors), strict=True)


def finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or Inf."""
    return [name for name, one in tensors.items() if not bool(torch.isfinite(one).all())]
