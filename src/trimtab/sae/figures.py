"""What a learner says of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trimtab.sae.architectures import Terms


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLosses:
    """One step in unscaled units; `loss = recon + sparsity + aux`, before the step."""

    step: int
    """0-based number of the step."""
    loss: float
    recon: float
    """Mean over tokens of the squared error; targets have a mean squared length of 1, so it is a share of that."""
    l0: float
    """Mean number of active latents per token."""
    sparsity: float
    """The penalty with its coefficient."""
    aux: float
    """Auxiliary losses with their coefficients."""
    grad_norm: float
    """Of the unscaled gradient, before clipping; nan where none was asked for."""
    lr: float
    """In unscaled units."""
    coefficient: float
    """Of the sparsity."""
    skipped: bool = False
    """The gradient was not finite and nothing moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """Whether every parameter can learn, seen from one batch."""

    passed: bool
    problems: tuple[str, ...]
    """One line each; empty when it passed."""
    gradients: Mapping[str, float]
    """Length of each parameter's unscaled gradient."""
    zeros: Mapping[str, float]
    """Share of each gradient's elements that are exactly 0."""

    @classmethod
    def of(cls, gradients: Mapping[str, Tensor], *, reached: bool) -> SelfTest:
        """Judge the gradients of whole parameters, and whether the sparsity reaches any of them."""
        problems = []
        for name, gradient in gradients.items():
            finite = bool(gradient.isfinite().all())
            if not finite or not gradient.any():
                problems.append(f"{name}: the gradient is {'0 everywhere' if finite else 'not finite'}")
        if not reached:
            problems.append("sparsity: it reaches no parameter, so L0 cannot change")
        return cls(
            passed=not problems,
            problems=tuple(problems),
            gradients={name: float(value.norm()) for name, value in gradients.items()},
            zeros={name: float((value == 0).double().mean()) for name, value in gradients.items()},
        )


@dataclass(slots=True)
class Computed:
    """What one batch asks for, before anything moves; processes that share a batch may reduce it."""

    losses: dict[str, float]
    """loss, recon, l0, sparsity, aux."""
    gradients: dict[str, Tensor]
    """Of the stored parameters, stored units."""
    fired: Tensor
    """[d_sae] tokens of the batch on which each latent fired."""
    tokens: int
    coefficient: float
    cut: Tensor | None
    """BatchTopK kinds: the smallest latent that was kept, stored units."""
    norm: float | None = None
    """Of the whole unscaled gradient, where `gradients` are a part of it."""


def figures_of(terms: Terms, tokens: int) -> dict[str, float]:
    """Return loss, recon, l0, sparsity and aux of a batch."""
    recon, sparsity, aux = (float(part.detach()) for part in terms[:3])
    l0 = float(terms.fired.sum()) / tokens
    return {"loss": recon + sparsity + aux, "recon": recon, "l0": l0, "sparsity": sparsity, "aux": aux}


def step_losses(
    losses: Mapping[str, float], *, step: int, grad_norm: float, lr: float, coefficient: float, skipped: bool = False
) -> StepLosses:
    """Return the figures of a batch with what the step adds to them."""
    return StepLosses(
        step=step,
        loss=losses["loss"],
        recon=losses["recon"],
        l0=losses["l0"],
        sparsity=losses["sparsity"],
        aux=losses["aux"],
        grad_norm=grad_norm,
        lr=lr,
        coefficient=coefficient,
        skipped=skipped,
    )
