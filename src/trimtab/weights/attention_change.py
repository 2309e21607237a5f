"""The attention of every layer, head by head, before and after training: who attends to whom, and what that writes.

The affinity of a query direction and a key direction is the attention logit of two tokens that carry them (QK). What a
token that carries a direction writes when it is attended to is VO; its part along a direction promotes that direction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from trimtab.weights._excess import excess
from trimtab.weights._lengths import distance, inner
from trimtab.weights._memory import return_memory
from trimtab.weights._open import Options, analyse
from trimtab.weights._rows import Change, Cross, LayerPart, direction_rows, pair_rows
from trimtab.weights._run import Context
from trimtab.weights.layer import LayerMath
from trimtab.weights.load import LayerWeights
from trimtab.weights.run import WeightsRun

_ROWS = 192
"""Directions whose outputs are held for every head at once."""


def measure_attention(
    base: str | Path, tuned: str | Path, directions: Any, *, offset: int = 0, **options: Unpack[Options]
) -> WeightsRun:
    """Compare who attends to whom, and what attention writes, for every direction and pair of directions.

    Part `qk`: `affinity`, the logit before the softmax of a query and a key along one direction (sign 1) or of a query
    along it and a key along its opposite (sign -1), of every head and as the mean over heads. Part `vo`: `promotion`,
    what attending to a direction writes along it, of every head (they add up to the whole, where there is no bias) and
    summed; sign -1 puts the opposite in and reads along it; `change`, |tuned - base| of what is written, by head and
    summed, its `length` in both models, and `excess`, the change of the sum over what the controls' changed by where
    it is as long. Interactions are affinities (query, key) and promotions (read, written) of different directions.

    Args:
        base: directory, hub id, or "testbed".
        tuned: a model of the same architecture.
        directions: what `read_directions` takes.
        offset: positions that the query stands after the key; RoPE and position temperatures follow it.
        options: see `Options`.

    Returns:
        The run: `.report`, `.frame()`, `.interactions()`.

    Raises:
        InputError: models that cannot be compared, layers outside the model or without softmax attention, too few
            controls.
        VectorError: directions of another width or layer.
    """
    return analyse("attention", measure_layer, base, tuned, directions, offset=offset, **options)


def measure_layer(context: Context) -> LayerPart:
    """Measure one layer's attention; a layer without softmax attention has no rows."""
    settings = context.settings
    if not context.base.weights.attention:
        return LayerPart(layer=context.layer, rows=direction_rows(context.layer, [], settings.directions, [], 0.0))
    affinities, qk = _affinities(context)
    promotions, vo, written = _promotions(context)
    changes = [*affinities, *promotions]
    rows = [direction_rows(context.layer, changes, settings.directions, settings.reference, context.unit)]
    rows += [
        pair_rows(
            context.layer, cross, settings.directions, settings.reference, context.unit, settings.pairs, scale=scale
        )
        for cross, scale in ((qk, None), (vo, written))
    ]
    combined = rows[0].vstack(rows[1]).vstack(rows[2])
    return LayerPart(layer=context.layer, rows=combined, crosses=(qk, vo))


def _affinities(context: Context) -> tuple[list[Change], Cross]:
    """Affinities of each direction with itself and with its opposite, by head, and the mean over heads of all pairs."""
    sides = [_logits(math, context.units, context.settings.offset) for math in (context.base, context.tuned)]
    changes = []
    for sign, place in ((1, 0), (-1, 1)):
        heads = [side[place] for side in sides]
        scale = float(max(one.abs().max() for one in heads))
        for before, after in (heads, [one.mean(dim=0) for one in heads]):
            changes.append(
                Change(part="qk", measure="affinity", base=before, tuned=after, delta=after - before, sign=sign,
                       scale=scale)
            )  # fmt: skip
    means = [side[2] for side in sides]
    return changes, Cross(part="qk", base=means[0], tuned=means[1], delta=means[1] - means[0])


def _logits(math: LayerMath, units: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of (x, x) and of (x, -x) by head, float64 [heads, n], and of all pairs the mean over heads."""
    scores = math.qk(units, units, offset)
    own, mean = _diagonal(scores), scores.mean(dim=0).float().cpu()
    del scores  # the largest tensor of all
    return_memory()
    if _is_odd(math.weights, ("q", "k")):
        return own, -own, mean
    return own, _diagonal(math.qk(units, -units, offset)), mean


def _diagonal(scores: Tensor) -> Tensor:
    return torch.diagonal(scores, dim1=1, dim2=2).double().cpu()


def _promotions(context: Context) -> tuple[list[Change], Cross, float]:
    """What attending to each direction writes, a few directions at a time so that all heads of both models fit."""
    pieces = [_written(context, rows) for rows in torch.split(context.units, _ROWS)]
    return_memory()
    found = {name: torch.cat([piece[name] for piece in pieces], dim=-1) for name in pieces[0] if name[0] != "cross"}
    crosses = [torch.cat([piece["cross", side] for piece in pieces]) for side in ("base", "tuned")]
    scale = float(max(found["length", side].max() for side in ("base", "tuned")))
    changes = []
    for name, sign in (("heads", 1), ("total", 1), ("opposite", -1)):
        before, after = found[name, "base"], found[name, "tuned"]
        changes.append(
            Change(part="vo", measure="promotion", base=before, tuned=after, delta=after - before, sign=sign,
                   scale=scale)
        )  # fmt: skip
    before, after = found["length", "base"], found["length", "tuned"]
    changes.append(Change(part="vo", measure="length", base=before, tuned=after, delta=after - before, scale=scale))
    changes += [
        Change(part="vo", measure="change", delta=found[name, "change"], scale=scale) for name in ("heads", "total")
    ]
    moved, reference = found["total", "change"], context.settings.reference
    changes.append(excess("vo", moved, before, reference, context.unit))
    return changes, Cross(part="vo", base=crosses[0], tuned=crosses[1], delta=crosses[1] - crosses[0]), scale


def _written(context: Context, rows: Tensor) -> dict[tuple[str, str], Tensor]:
    sides = {"base": context.base.vo(rows), "tuned": context.tuned.vo(rows)}
    found: dict[tuple[str, str], Tensor] = {}
    for side, vo in sides.items():
        found["heads", side] = inner(vo.heads, rows)
        found["total", side] = inner(vo.total, rows)
        found["cross", side] = (vo.total @ context.units.T).float().cpu()
        found["length", side] = vo.total.double().norm(dim=-1).cpu()
    found["heads", "change"] = distance(sides["base"].heads, sides["tuned"].heads)
    found["total", "change"] = distance(sides["base"].total, sides["tuned"].total)
    for side, math in (("base", context.base), ("tuned", context.tuned)):
        odd = _is_odd(math.weights, ("v", "o"))
        found["opposite", side] = found["total", side] if odd else inner(math.vo(-rows).total, -rows)
    return found


def _is_odd(weights: LayerWeights, names: tuple[str, ...]) -> bool:
    """Whether matrices make exactly the opposite of the opposite direction: no bias and no gate is in the way."""
    plain = weights.numerics.norm != "layernorm" and "q_gate" not in weights
    return plain and all(weights.bias(name) is None for name in names)
