"""Run a model on reconstructions: cross entropy and KL with an autoencoder spliced in through the steering sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from trimtab._base.progress import Progress
from trimtab.backends import Capture, Request
from trimtab.results.sae_evaluation import Splice
from trimtab.sae._intervals import GROUPS, Sums, ratio
from trimtab.sae._sets import Context, ModelSet, RowKeeper
from trimtab.sae.model import SAE
from trimtab.steering import Edit, Steering

_ROWS = 256
"""Rows of logits that are held in float64 at a time."""
CLEAN, ZERO, MEAN = "clean", "zero", "mean"


def spliced(sae: SAE, site: str, target: str, positions: str) -> Steering:
    """Return the steering that replaces rows by their reconstruction.

    The edit computes in the autoencoder's own dtype; what it changes is rounded once into the model's, as with any op.

    Args:
        sae: on the model's device.
        site: what it reads.
        target: what it replaces; another site than `site` for a transcoder, and later in the same forward pass.
        positions: the rows.
    """
    if site == target:
        return Steering({site: Edit(sae.forward, name="SAE")}, positions=positions)
    held: list[Tensor] = []

    def read(h: Tensor) -> Tensor:
        held.append(sae.forward(h))
        return h

    def write(h: Tensor) -> Tensor:
        return held.pop().to(h.dtype)

    whole = Steering({site: Edit(read, name="SAE input")}, positions=positions)
    return whole + Steering({target: Edit(write, name="SAE")}, positions=positions)


def splices(
    data: ModelSet,
    saes: Mapping[str, SAE],
    mean: Tensor,
    *,
    seed: int = 0,
    progress: Progress,
) -> dict[str, Splice]:
    """Measure what the model loses on every text, for each autoencoder, for zeros and for the mean.

    Args:
        data: the texts; rows that do not count stay as they are, and what they predict is not compared.
        saes: name -> autoencoder.
        mean: [d_out], of the evaluation set.
        seed: of the intervals.
        progress: counts texts.
    """
    ways: dict[str, Callable[[str], Steering]] = {
        ZERO: lambda where: Steering({data.target: Edit(torch.zeros_like, name="zero")}, positions=where),
        MEAN: lambda where: Steering(
            {data.target: Edit(lambda h: mean.to(h.device, h.dtype).expand_as(h), name="mean")}, positions=where
        ),
    }
    for name, sae in saes.items():
        ways[f"sae {name}"] = lambda where, sae=sae: spliced(sae, data.site, data.target, where)  # type: ignore[misc]
    count = Sums()
    losses = {name: Sums() for name in (CLEAN, *ways)}
    divergences = {name: Sums() for name in ways}
    for at in range(0, len(data.contexts), data.batch):
        texts = range(at, min(at + data.batch, len(data.contexts)))
        clean = _logits(data, texts, None)
        for text in texts:
            context = data.contexts[text]
            count.add(*_one(text, float(context.rows - 1)))
            losses[CLEAN].add(*_one(text, _nll(clean[text], context)))
        for name, make in ways.items():
            other = _logits(data, texts, make)
            for text in texts:
                context = data.contexts[text]
                losses[name].add(*_one(text, _nll(other[text], context)))
                divergences[name].add(*_one(text, _kl(clean[text], other[text])))
        progress.advance(len(texts))
    return {name: _splice(losses, divergences[f"sae {name}"], losses[f"sae {name}"], count, seed) for name in saes}


def _splice(losses: Mapping[str, Sums], kl: Sums, own: Sums, count: Sums, seed: int) -> Splice:
    tokens = count.total
    clean, zero, mean = (losses[name].values for name in (CLEAN, ZERO, MEAN))
    return Splice(
        tokens=int(tokens),
        ce_clean=losses[CLEAN].total / tokens,
        ce_sae=own.total / tokens,
        ce_zero=losses[ZERO].total / tokens,
        ce_mean=losses[MEAN].total / tokens,
        delta_ce=ratio(own.values - clean, count.values, seed),
        recovered=ratio(zero - own.values, zero - clean, seed),
        recovered_mean=ratio(mean - own.values, mean - clean, seed),
        kl=ratio(kl.values, count.values, seed),
    )


def _one(text: int, value: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([text % GROUPS]), torch.tensor([value], dtype=torch.float64)


def _logits(data: ModelSet, texts: Sequence[int], make: Callable[[str], Steering] | None) -> dict[int, Tensor]:
    """Return, for each text, the logits of the rows that count and predict one of its tokens."""
    rows = RowKeeper()
    requests = []
    for text in texts:
        context = data.contexts[text]
        steering = None if make is None else make(f"{context.skip}:")
        requests.append(
            Request(prompt=context.ids, id=str(text), prompt_index=text, steering=steering, max_new_tokens=0)
        )
    data.backend.generate(requests, capture=Capture(sites=("logits",), prompt_logits=True), writer=rows)
    return {text: rows.of("logits", str(text))[data.contexts[text].skip : -1] for text in texts}


def _nll(logits: Tensor, context: Context) -> float:
    """Return the negative log-likelihood of the tokens that the rows predict, summed, nats."""
    wanted = torch.tensor(context.ids[context.skip + 1 :])
    total = 0.0
    for at in range(0, len(wanted), _ROWS):
        part = torch.log_softmax(logits[at : at + _ROWS].double(), dim=-1)
        total -= float(part.gather(1, wanted[at : at + _ROWS, None]).sum())
    return total


def _kl(clean: Tensor, other: Tensor) -> float:
    """Return KL(clean || other) summed over the rows, nats; never below 0."""
    total = 0.0
    for at in range(0, len(clean), _ROWS):
        p, q = (torch.log_softmax(one[at : at + _ROWS].double(), dim=-1) for one in (clean, other))
        total += float((p.exp() * (p - q)).nan_to_num(0.0).sum(dim=1).clamp_min(0.0).sum())
    return total
