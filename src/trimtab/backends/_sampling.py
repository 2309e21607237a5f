"""The next token of one request: greedy, drawn, or forced; and its log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.backends.base import Sampling


class Sampler:
    """Draws the tokens of one request with a generator of its own.

    Every token costs one uniform number, drawn on the CPU in float64, so that equal logits give equal tokens whatever
    else is in the batch and wherever the model runs.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """Return a token id.

        Args:
            logits: float32 [vocab] of one row.
        """
        options = self._sampling
        if options.temperature == 0:
            return int(logits.argmax())
        weights = torch.softmax(logits.to("cpu", torch.float64) / options.temperature, dim=-1)
        weights, order = weights.sort(descending=True, stable=True)
        if options.top_k:
            weights = weights[: options.top_k]
        cumulative = weights.cumsum(0)
        if options.top_p < 1:
            # keep the tokens before which less than top_p was reached: the one that reaches it stays
            kept = int((cumulative - weights < options.top_p * cumulative[-1]).sum())
            cumulative = cumulative[:kept]
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        index = int(torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(cumulative) - 1))
        return int(order[index])


class LogProbs:
    """Log-softmax of rows of logits: natural log, computed in float32 as `(x - max) - log sum exp(x - max)`.

    Args:
        logits: [n, vocab] of any float dtype.
    """

    def __init__(self, logits: Tensor) -> None:
        self.values = logits.float()
        self._most = self.values.amax(-1, keepdim=True)
        self._rest = (self.values - self._most).exp_().sum(-1, keepdim=True).log_()

    def of(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of one token per row, [n]; `tokens` is int64 [n]."""
        return ((self.values.gather(-1, tokens[:, None]) - self._most) - self._rest)[:, 0]

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and ids of the `count` most likely tokens of each row, best first, ties by id."""
        best, ids = self.values.topk(min(count, self.values.shape[-1]), dim=-1)
        ids, order = ids.sort(dim=-1)
        best, places = best.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return (best - self._most) - self._rest, ids.gather(-1, places)
