"""Latents worth showing, and the text around their strongest firings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.results.sae_evaluation import Example, LatentExamples
from trimtab.sae._sets import EvaluationSet, Part
from trimtab.sae._tally import Shown, Tally

BEFORE, AFTER = 10, 6
"""Tokens that are shown around a firing."""


def choose(tally: Tally, latents: int | Sequence[int]) -> list[int]:
    """Return the columns of the watched latents to show: those asked for, else a spread over the densities.

    Latents that never fire, or fire on more than half of the tokens, are passed over where there are others.
    """
    if not isinstance(latents, int):
        return list(range(len(tally.watched)))
    density = tally.density[tally.watched]
    good = ((density > 0) & (density <= 0.5)).nonzero()[:, 0]
    if not len(good):
        good = (density > 0).nonzero()[:, 0]
    order = good[density[good].argsort(descending=True, stable=True)]
    if len(order) <= latents:
        return [int(one) for one in order]
    steps = torch.linspace(0, len(order) - 1, latents).round().long().tolist()
    return [int(order[step]) for step in dict.fromkeys(steps)]


def examples_of(tally: Tally, rows: EvaluationSet, columns: Sequence[int], most: int) -> tuple[LatentExamples, ...]:
    """Return the chosen latents with the text around their strongest firings.

    The texts are run again, those that are needed, to know the latent on the neighbours.
    """
    if most < 1 or not columns:
        return ()
    found = {column: tally.examples(column)[:most] for column in columns}
    texts = {one.text for shown in found.values() for one in shown}
    kept: dict[int, tuple[tuple[int, ...], Tensor, Sequence[str]]] = {}
    chosen = tally.watched[torch.tensor(list(columns))].to(tally.sae.W_enc.device)
    with torch.no_grad():
        for parts in rows.parts(texts):
            for part in parts:
                kept[part.text] = (part.positions, _latents(tally, part, chosen), rows.words(part.text))
    place = {column: number for number, column in enumerate(columns)}
    made = []
    for column, shown in found.items():
        latent = int(tally.watched[column])
        fired = int(tally.fired[latent])
        made.append(
            LatentExamples(
                latent=latent,
                density=fired / tally.rows,
                max=float(tally.largest[latent]),
                mean=float(tally.total[latent]) / fired if fired else 0.0,
                examples=tuple(_example(one, kept[one.text], place[column]) for one in shown),
            )
        )
    return tuple(made)


def _latents(tally: Tally, part: Part, chosen: Tensor) -> Tensor:
    return tally.sae.encode(part.x.to(chosen.device))[:, chosen].float().cpu()


def _example(shown: Shown, text: tuple[tuple[int, ...], Tensor, Sequence[str]], column: int) -> Example:
    positions, values, words = text
    first = max(0, shown.position - BEFORE)
    last = min(len(words), shown.position + AFTER + 1) if words else shown.position + 1
    row = {position: index for index, position in enumerate(positions)}
    window = range(first, last) if words else range(shown.position, shown.position + 1)
    return Example(
        activation=shown.value,
        text=shown.text,
        position=shown.position,
        tokens=tuple(words[at] if words else "" for at in window),
        activations=tuple(float(values[row[at], column]) if at in row else 0.0 for at in window),
        at=shown.position - window.start,
    )
