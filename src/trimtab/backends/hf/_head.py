"""Whether the logits are what the head makes of the last hidden states, and in words what they are otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trimtab._base.log import get_logger
from trimtab.architectures import ModelMap
from trimtab.sites import Site

_LOG = get_logger(__name__)
_SOFTCAPS = (10.0, 15.0, 20.0, 30.0, 50.0)  # those that published models use
_CLOSE = 1e-2


class Head(NamedTuple):
    """The largest error relative to the largest logit, and what differs; None: it could not be checked, and why."""

    error: float | None
    words: str


def check_head(model: nn.Module, sites: ModelMap, seen: Mapping[Site, Tensor], logits: Tensor) -> Head:
    """Compare the logits of a forward pass with `head(final_norm(resid_post))`, under the family's softcap.

    Args:
        model: the model.
        sites: its map.
        seen: the last `resid_post` and the output of the final norm in that pass, [batch, sequence, width].
        logits: [batch, sequence, vocabulary] of that pass.
    """
    stream, normed = seen.get(Site("resid_post", layer=sites.num_layers - 1)), seen.get(Site("final_norm"))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if stream is None or normed is None or head is None:
        missing = "output head" if head is None else "final_norm" if normed is None else "last resid_post"
        words = f"the logits were not checked against the hidden states: this model has no {missing}"
        _LOG.info(words)
        return Head(None, words)
    with torch.no_grad():
        again = model.get_submodule(sites.handle(Site("final_norm")).module_path)(stream)
        made = head(again)
    cap = None if sites.numerics is None else sites.numerics.logit_softcap
    error = relative_error(_softcap(made, cap), logits)
    words = _words(relative_error(again, normed), made.double(), logits.double(), error)
    if sites.fallback and error > _CLOSE:
        _LOG.info(words)
    return Head(error, words)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest element of `b`."""
    a, b = a.double(), b.double()
    scale = b.abs().max().item()
    return (a - b).abs().max().item() / scale if scale else float(not torch.equal(a, b))


def _softcap(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _words(norm_error: float, made: Tensor, logits: Tensor, error: float) -> str:
    what = "head(final_norm(resid_post)) of the last block"
    if norm_error > _CLOSE:
        return f"the final norm takes something else than the last resid_post (relative error {norm_error:.2g})"
    factor = ((made * logits).sum() / made.square().sum()).item()
    if relative_error(factor * made, logits) < _CLOSE:
        return f"the logits are {factor:.4g} times {what}"
    for cap in _SOFTCAPS:
        if relative_error(_softcap(made, cap), logits) < _CLOSE:
            return f"the logits are {what} under a softcap of {cap:g}"
    return f"the logits are not {what} (relative error {error:.2g})"
