"""Validation: the loss that is minimised and the perplexity, for the steered, the unsteered and the prompted model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.vectors.train._batches import Batch
from trimtab.vectors.train._loss import bipo, sequence_logprobs, token_losses
from trimtab.vectors.train._model import SteeredModel


class Figures(NamedTuple):
    """Loss and perplexity over some batches."""

    loss: float
    perplexity: float


def likelihood(model: SteeredModel, batches: Sequence[Batch], *, steered: bool) -> Figures:
    """Return the mean negative log-likelihood per target token, summed in float64, and its exponential."""
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            total += float(token_losses(model.logits(batch, steered=steered), batch).double().sum())
    loss = total / sum(batch.num_targets for batch in batches)
    return Figures(loss, _exp(loss))


def preference(
    model: SteeredModel, batches: Sequence[Batch], references: Sequence[Tensor], beta: float, *, steered: bool
) -> Figures:
    """Return the mean BiPO loss over pairs and both signs, and the perplexity of the chosen answers."""
    losses, count, logprob, targets = 0.0, 0, 0.0, 0
    with torch.no_grad():
        for batch, reference in zip(batches, references, strict=True):
            pairs = batch.num_sequences // 2
            for d in (1.0, -1.0):
                signs = torch.full((pairs,), d, device=reference.device)
                found = bipo(model, batch, reference, signs, beta) if steered else functional.softplus(0 * signs)
                losses, count = losses + float(found.double().sum()), count + pairs
            now = sequence_logprobs(model.logits(batch), batch) if steered else reference
            logprob += float(now[0::2].double().sum())
            targets += int((batch.targets & (batch.owner % 2 == 0)).sum())
    return Figures(losses / count, _exp(-logprob / targets))


def references(model: SteeredModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the log-likelihood of each sequence without steering, per batch."""
    with torch.no_grad():
        return [sequence_logprobs(model.logits(batch, steered=False), batch) for batch in batches]


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
