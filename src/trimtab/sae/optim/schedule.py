"""What the learning rate and the sparsity coefficient do over a run."""

from __future__ import annotations

from trimtab.sae.config import OptimConfig


def lr_factor(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Return the share of the peak rate at a step.

    It rises along a line from a tenth over the warm-up (a tenth of the run at most), stays, and falls along a line
    towards 0 over the last `decay` of the run.

    Args:
        optim: has `warmup` and `decay`.
        step: 0-based.
        total_steps: of the run.
    """
    warmup = min(optim.warmup, total_steps // 10)
    rise = 0.1 + 0.9 * step / warmup if step < warmup else 1.0
    falling = max(1, round(optim.decay * total_steps))
    fall = (total_steps - step) / falling if optim.decay and step > total_steps - falling else 1.0
    return max(0.0, min(rise, fall))


def sparsity_factor(optim: OptimConfig, step: int) -> float:
    """Return the share of the sparsity coefficient at a step, 0-based: (step + 1) / warm-up, at most 1."""
    return min(1.0, (step + 1) / optim.sparsity_warmup) if optim.sparsity_warmup else 1.0
