"""Which rows of a tensor carry the error: tokens of sequences where its shape says so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from trimtab.compare import ComparisonPlan
from trimtab.compare._measured import Floats, relative_rows
from trimtab.compare.align import Aligned
from trimtab.compare.measure import measure
from trimtab.results.triage import RowRange, TokenStrip
from trimtab.workflows.triage._tensors import Tensor

_CELLS = 256


def row_errors(tensor: Tensor, plan: ComparisonPlan) -> Floats | None:
    """Relative error by row; None where the two sides cannot be laid side by side."""
    if not tensor.pair.stored:
        return None
    aligned = Aligned(tensor.pair, plan.reference.trace, plan.candidate.trace)
    if not (aligned.fits and aligned.comparable):
        return None
    measured = measure(aligned.fused(), aligned.shape, aligned.dtypes)
    relative = relative_rows(measured.row_error, measured.row_norm)
    if measured.metrics.nonfinite_match:
        return relative
    apart = [_nonfinite_apart(chunk.reference, chunk.candidate) for chunk in aligned.chunks()]
    return np.where(np.concatenate(apart), np.inf, relative)


def find_rows(tensor: Tensor, plan: ComparisonPlan) -> RowRange | None:
    """Return the rows that carry the error, as ranges of tokens."""
    errors = row_errors(tensor, plan)
    if errors is None or errors.size == 0:
        return None
    worst = float(np.nan_to_num(errors, posinf=np.inf).max())
    limit = min(8 * tensor.expected, worst / 2) if math.isfinite(worst) else 8 * tensor.expected
    bad = np.flatnonzero(errors > max(limit, worst / 1000 if math.isfinite(worst) else 0))
    shape = tensor.record.shape_reference
    total = len(errors)
    if tensor.pair.positions is not None:
        text = f"positions {spans(tensor.pair.positions[bad])}"
    elif len(bad) == total:
        text = f"all {total} rows"
    elif len(shape) >= 3 and tensor.side not in ("param", "param_grad", "optim"):
        text = _sequences(bad, shape[-2])
    else:
        text = f"{'tokens' if tensor.direction == 'forward' else 'rows'} {spans(bad)}"
    return RowRange(rows=len(bad), total=total, text=text)


def strips(
    tensors: Sequence[Tensor], first: Tensor, plan: ComparisonPlan, before: int = 4, after: int = 12
) -> tuple[TokenStrip, ...]:
    """Return the errors by token of the tensors around the divergence that have as many rows as it."""
    rows = _row_count(first)
    near = [
        one for one in tensors
        if one is first or (
            one.group == first.group and one.direction == first.direction and _row_count(one) in (rows, None)
            and one.side in ("output", "grad_input", "grad_output", "value")
        )
    ]  # fmt: skip
    at = near.index(first)
    found = []
    for one in near[max(0, at - before) : at + after + 1]:
        errors = np.zeros(rows or 0) if one.record.status == "identical" else row_errors(one, plan)
        if errors is None or errors.size == 0 or (rows is not None and len(errors) != rows):
            continue
        cell = max(1, -(-len(errors) // _CELLS))
        thinned = [float(errors[start : start + cell].max()) for start in range(0, len(errors), cell)]
        found.append(TokenStrip(tensor=one.name, errors=tuple(thinned), rows_per_cell=cell, expected=one.expected))
    return tuple(found)


def spans(rows: npt.NDArray[np.int64], most: int = 6) -> str:
    """Numbers as ranges: `0-3, 7`."""
    if len(rows) == 0:
        return "none"
    parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    texts = [f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more runs" if len(texts) > most else "")


def _sequences(bad: npt.NDArray[np.int64], length: int) -> str:
    """Ranges of tokens per sequence; one text where all sequences have the same."""
    by = {int(one): bad[bad // length == one] % length for one in np.unique(bad // length)}
    texts = {number: spans(rows) for number, rows in by.items()}
    if len(set(texts.values())) == 1 and len(texts) > 1:
        return f"tokens {next(iter(texts.values()))} of sequences {spans(np.array(sorted(texts)))}"
    parts = [f"tokens {text} of sequence {number}" for number, text in texts.items()]
    return "; ".join(parts[:4]) + (f" and {len(parts) - 4} more sequences" if len(parts) > 4 else "")


def _nonfinite_apart(reference: torch.Tensor, candidate: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Rows with NaN or Inf on one side alone, whose error counts as infinite."""
    ours, theirs = reference.double(), candidate.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan()) | (ours.isfinite() & theirs.isfinite())
    bad: npt.NDArray[np.bool_] = (~same.all(dim=1)).numpy()
    return bad


def _row_count(tensor: Tensor) -> int | None:
    if tensor.pair.positions is not None:
        return len(tensor.pair.positions)
    shape = tensor.record.shape_reference
    return math.prod(shape[:-1]) if shape else None
