"""What adding a vector does, measured on held-out examples without generating anything.

A vector that steers makes the texts of its own side more likely and those of the other side less. So at every site its
unit direction is added with both signs, and the effect is half of what that moves the difference of the two sides:
`(l+(pos) - l-(pos) - l+(neg) + l-(neg)) / 2`, `l` the mean log-probability of a text's tokens that count, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from trimtab._base.progress import SILENT, Progress
from trimtab.errors import TrimtabError
from trimtab.sites import Site
from trimtab.steering import Add, Steering
from trimtab.vectors.data import ContrastData, Encoded, Encoder

STRENGTH = 0.1
"""Part of each token's norm that is added, the same at every site."""
MOST = 32
"""Held-out examples of each label that are read."""


def num_texts(data: ContrastData) -> int:
    """How many of the held-out examples are read at every site."""
    return sum(min(data.counts.get(label, 0), MOST) for label in (data.positive, data.negative))


def steering_effects(
    backend: Any, units: Mapping[Site, Tensor], data: ContrastData, encoder: Encoder, progress: Progress = SILENT
) -> tuple[dict[Site, float], str]:
    """Return the effect at every site, in nats per token, and why there are none where there are none.

    Args:
        backend: the model.
        units: site -> unit direction, float32 [D].
        data: held-out examples, of which the first `MOST` of each label are read.
        encoder: tells which tokens count.
        progress: told of each finished example of each site.
    """
    sides = [[one for one in data.examples if one.label == label][:MOST] for label in (data.positive, data.negative)]
    encoded = [encoder(one) for side in sides for one in side]
    found = {}
    for site, unit in units.items():
        try:
            up, down = (_likelihoods(backend, encoded, site, unit, sign) for sign in (1, -1))
        except TrimtabError as error:
            return {}, f"the effect of steering at {site} cannot be measured: {error}"
        progress.advance(len(encoded))
        moved = (up - down) / 2
        found[site] = float(moved[: len(sides[0])].mean() - moved[len(sides[0]) :].mean())
    return found, ""


def _likelihoods(
    backend: Any, encoded: Sequence[Encoded], site: Site, unit: Tensor, sign: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean log-probability of the tokens that count, one a text; a first token that counts has no prediction."""
    steering = Steering({str(site): Add(unit, scale=sign * STRENGTH, unit="token_norm")}, positions="all")
    scored = backend.score([one.ids for one in encoded], steering=steering)
    return np.array(
        [
            np.asarray(score.logprobs, dtype=np.float64)[np.array(one.mask[1:], dtype=bool)].mean()
            if any(one.mask[1:])
            else 0.0
            for score, one in zip(scored, encoded, strict=True)
        ]
    )
