"""How far a change exceeds what controls whose answer is as long change by.

An answer that is twice as long moves further in every training and turns less. The length of an answer alone would
therefore rank directions, by the distance that it moved one way and by its angle the other way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.weights._rows import ROUNDING, Change


def excess(
    part: str,
    moved: Float[Tensor, " n"],
    lengths: Float[Tensor, " n"],
    reference: Sequence[int],
    unit: float,
    *,
    sign: int = 1,
) -> Change:
    """Divide what every answer moved by, by what the controls' do at its length: 1 is a control's move, 0 is none.

    Over the controls `log moved = a + s log length` is fitted by least squares, with s kept between 0 (the length does
    not matter) and 1 (a share of the answer moves); `length^s`, scaled to the controls' mean, is what is expected.

    Args:
        part: which branch.
        moved: |tuned - base| of every answer, float64.
        lengths: |base| of every answer, float64.
        reference: rows of the controls.
        unit: unit roundoff of the arithmetic; nothing is expected to move by less than it may.
        sign: -1 when the opposites were put in.
    """
    rows = list(reference)
    size = float(lengths.max()) + float(moved.max())
    least = ROUNDING * unit * size
    powers = lengths.clamp_min(torch.finfo(torch.float64).tiny) ** _slope(moved[rows], lengths[rows])
    scale = (moved[rows] / powers[rows]).mean()
    expected = (powers * scale).clamp_min(least)
    ratio = torch.where(moved > 0, moved / expected, 0.0)
    typical = float(expected[rows].mean())
    return Change(part=part, measure="excess", delta=ratio, sign=sign, scale=size / typical if typical else 1.0)


def _slope(moved: Tensor, lengths: Tensor) -> float:
    known = (moved > 0) & (lengths > 0)
    across, up = lengths[known].log(), moved[known].log()
    if len(across) < 3 or float(across.std()) == 0:
        return 0.0
    across = across - across.mean()
    return min(1.0, max(0.0, float((across @ (up - up.mean())) / (across @ across))))
