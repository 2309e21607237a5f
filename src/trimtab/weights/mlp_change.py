"""The MLP of every layer, whole, before and after training: what it answers to a direction and to its opposite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from trimtab.weights._excess import excess
from trimtab.weights._lengths import apart, inner
from trimtab.weights._memory import return_memory
from trimtab.weights._open import Options, analyse
from trimtab.weights._rows import Change, Cross, LayerPart, direction_rows, pair_rows
from trimtab.weights._run import Context
from trimtab.weights.layer import LayerMath
from trimtab.weights.run import WeightsRun

PART = "mlp"
_ROWS = 1024


def measure_mlp(base: str | Path, tuned: str | Path, directions: Any, **options: Unpack[Options]) -> WeightsRun:
    """Compare what the MLP of every layer answers to every direction and to its opposite.

    With `y` what the MLP adds to the stream for the unit direction `x`, through the block's own norms: `absolute` is
    |y_tuned - y_base|; `excess`, that over what the controls' answers of the same length moved by; `angular`, 1 minus
    the cosine of the two; `length`, |y| of both; `parallel`, <y, x>: positive where the MLP reinforces the direction
    that it reads; `orthogonal`, the rest of y. With sign -1 the opposite -x was put in, and `parallel` is along it.
    Interactions are <y_tuned - y_base, u> for every other direction u.

    Args:
        base: directory, hub id, or "testbed".
        tuned: a model of the same architecture.
        directions: what `read_directions` takes.
        options: see `Options`.

    Returns:
        The run: `.report` names the two focus layers, where the answers moved most and where they turned most.

    Raises:
        InputError: models that cannot be compared, layers outside the model, too few controls.
        VectorError: directions of another width or layer.
    """
    return analyse("mlp", measure_layer, base, tuned, directions, **options)


def measure_layer(context: Context) -> LayerPart:
    """Measure one layer's MLP for all directions, then for all opposites."""
    settings, units = context.settings, context.units
    before, after = (_answers(math, units) for math in (context.base, context.tuned))
    changes = _changes(context, before, after, 1)
    size = changes[0].scale
    cross = Cross(part=PART, delta=((after - before) @ units.T).float().cpu())
    before, after = (_answers(math, -units) for math in (context.base, context.tuned))
    changes += _changes(context, before, after, -1)
    rows = direction_rows(context.layer, changes, settings.directions, settings.reference, context.unit)
    pairs = pair_rows(
        context.layer, cross, settings.directions, settings.reference, context.unit, settings.pairs, scale=size
    )
    return LayerPart(layer=context.layer, rows=rows.vstack(pairs), crosses=(cross,))


def _answers(math: LayerMath, x: Tensor) -> Tensor:
    """Return what the MLP adds; the neurons of a few rows are held at a time."""
    answers = torch.cat([math.mlp(rows) for rows in torch.split(x, _ROWS)])
    return_memory()
    return answers


def _changes(context: Context, before: Tensor, after: Tensor, sign: int) -> list[Change]:
    found = apart(before, after)
    along = [sign * inner(y, context.units) for y in (before, after)]
    across = [(length**2 - one**2).clamp_min(0).sqrt() for length, one in zip(found[:2], along, strict=True)]
    scale = float(torch.maximum(found.base, found.tuned).max())

    def both(measure: str, values: list[Tensor]) -> Change:
        return Change(
            part=PART, measure=measure, base=values[0], tuned=values[1], delta=values[1] - values[0], sign=sign,
            scale=scale,
        )  # fmt: skip

    return [
        Change(part=PART, measure="absolute", delta=found.change, sign=sign, scale=scale),
        excess(PART, found.change, found.base, context.settings.reference, context.unit, sign=sign),
        Change(part=PART, measure="angular", delta=2 * torch.sin(found.angle / 2) ** 2, sign=sign),
        both("length", [found.base, found.tuned]),
        both("parallel", along),
        both("orthogonal", across),
    ]
