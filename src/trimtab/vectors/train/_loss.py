"""The two losses, as sums over a batch, and log-likelihoods per sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.vectors.train._batches import Batch
from trimtab.vectors.train._model import SteeredModel


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return the negative log-likelihood of every target, float32 [targets], row by row.

    Args:
        logits: [B, K, vocabulary] at the columns `batch.keep`; column t predicts token t + 1.
        batch: the batch they are of.
    """
    keep = batch.keep
    wanted = batch.targets[:, keep + 1].to(logits.device)
    labels = batch.ids[:, keep + 1].to(logits.device)
    return functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none")


def sequence_logprobs(logits: Tensor, batch: Batch) -> Tensor:
    """Return the log-likelihood of the targets of each sequence, float32 [sequences]."""
    keep = batch.keep
    owners = batch.owner[:, keep + 1][batch.targets[:, keep + 1]].to(logits.device)
    total = torch.zeros(batch.num_sequences, device=logits.device)
    return total.index_add(0, owners, -token_losses(logits, batch))


def bipo(model: SteeredModel, batch: Batch, reference: Tensor, signs: Tensor, beta: float) -> Tensor:
    """Return the BiPO loss of each pair, float32 [pairs].

    `-log sigmoid(d beta ((log p_v(chosen) - log p(chosen)) - (log p_v(rejected) - log p(rejected))))`, where the
    vector enters as `d v` with d = +1 or -1 drawn per pair: the vector learns to raise the preferred answer, and its
    opposite to raise the other one. Cao et al., "Personalized Steering of Large Language Models: Versatile Steering
    Vectors Through Bi-directional Preference Optimization", NeurIPS 2024, arXiv 2406.00045.

    Args:
        model: the steered model.
        batch: sequences 2i (chosen) and 2i + 1 (rejected) of each pair i.
        reference: [sequences], log-likelihoods without steering.
        signs: [pairs], d.
        beta: steepness.
    """
    pair = batch.owner.clamp(min=0) // 2
    sign = signs.to(pair.device)[pair][..., None]
    change = sequence_logprobs(model.logits(batch, sign=sign), batch) - reference
    margin = change[0::2] - change[1::2]
    return -functional.logsigmoid(signs.to(margin.device) * beta * margin)
