"""Mistakes that show only beside what came in: a residual left out, another activation function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor as Values

from trimtab.compare.align import Aligned
from trimtab.errors import ComparisonError, TraceError
from trimtab.results.comparison import Fingerprint
from trimtab.trace import Trace
from trimtab.workflows.triage._tensors import Tensor

_MOST = 1 << 22  # elements of a tensor that are looked at


def find_in_context(
    tensor: Tensor, sources: Sequence[Tensor], reference: Trace, candidate: Trace
) -> tuple[Fingerprint, ...]:
    """Return the fingerprints that relate the error of `tensor` to what it was made of.

    Args:
        tensor: the first wrong one.
        sources: what it was made of, as far as it was recorded.
        reference: holds the trusted values.
        candidate: holds those under test.
    """
    sides = _load(tensor, reference, candidate)
    if sides is None:
        return ()
    ours, error = sides[0], sides[1] - sides[0]
    found: list[Fingerprint] = []
    for source in sources:
        loaded = _load(source, reference, candidate)
        if loaded is not None and loaded[0].shape == ours.shape:
            came_in = loaded[0]
            found += _residual(error, came_in, source.name)
            found += _activation(error, came_in, ours) if tensor.side == "output" and len(sources) == 1 else ()
    return tuple(sorted(found, key=lambda one: -one.explained))


def _load(tensor: Tensor, reference: Trace, candidate: Trace) -> tuple[Values, Values] | None:
    """Both sides as float64 rows, put together from the ranks that hold them."""
    if not tensor.pair.stored:
        return None
    try:
        aligned = Aligned(tensor.pair, reference, candidate)
        if not (aligned.fits and aligned.comparable) or not 1 < aligned.rows * aligned.width <= _MOST:
            return None
        rows = aligned.between(0, aligned.rows)
    except (TraceError, ComparisonError):
        return None
    if not rows.reference.is_floating_point():
        return None
    return rows.reference.double(), rows.candidate.double()


def _residual(error: Values, came_in: Values, name: str) -> Iterator[Fingerprint]:
    """The error is a multiple of something that is added: left out, or added once too often."""
    square, size = float(came_in.square().sum()), float(error.square().sum())
    if square == 0 or size == 0:
        return
    factor = float((error * came_in).sum()) / square
    share = 1 - float((error - factor * came_in).square().sum()) / size
    if share > 0.98 and abs(abs(factor) - 1) < 0.05:
        how = "left out" if factor < 0 else "added once too often"
        detail = f"the error is {factor:.4g} times {name}: {how}?"
        yield Fingerprint(kind="residual", detail=detail, explained=share, value=factor)


def _activation(error: Values, came_in: Values, out: Values) -> Iterator[Fingerprint]:
    """Output and error are both functions of the single element: another function of it was applied."""
    if came_in.numel() < 64:
        return
    order = came_in.flatten().argsort()
    if _roughness(out.flatten()[order]) < 0.02 and (rough := _roughness(error.flatten()[order])) < 0.1:
        detail = "the error is a function of the single input element: another activation function?"
        yield Fingerprint(kind="activation", detail=detail, explained=1 - rough)


def _roughness(values: Values) -> float:
    """Mean square of the steps over twice the variance: 1 for noise, 0 for a smooth function."""
    variance = float(values.var())
    return float(torch.diff(values).square().mean()) / (2 * variance) if variance > 0 else 1.0
