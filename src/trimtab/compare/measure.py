"""Measure one aligned pair in chunks: type-correct, float64 sums, memory that does not grow with the pair.

Floats go through `numerics.pair.compare_pair`; integers and booleans are compared exactly; complex numbers as pairs of
floats; NaN and Inf by position, and left out of the sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from trimtab.compare._measured import Floats, Measured, relative_rows
from trimtab.numerics.dtypes import coarser, dtype_name
from trimtab.numerics.pair import PairStats, compare_pair
from trimtab.results.comparison import Metrics


class Chunk(NamedTuple):
    """Some rows of both sides, `[rows, width]`, and where they begin."""

    start: int
    reference: torch.Tensor
    candidate: torch.Tensor


def is_exact(dtype: torch.dtype) -> bool:
    """Integers and booleans, which admit no tolerance."""
    return not (dtype.is_floating_point or dtype.is_complex)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as `[rows, width]`: the last dimension stays, a scalar is one row of one, complex as real pairs."""
    real = torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() and tensor.ndim else tensor
    if real.is_complex():
        real = torch.view_as_real(real)
    if real.ndim == 0:
        return real.reshape(1, 1)
    width = real.shape[-1]
    return real.reshape(real.numel() // width if width else 0, width)


def measure(chunks: Iterable[Chunk], shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> Measured:
    """Measure a pair from its chunks.

    Args:
        chunks: rows in order, all of one width.
        shape: shape of the pair, for coordinates.
        dtypes: dtypes of reference and candidate as stored.
    """
    kinds = [_kind(dtype) for dtype in dtypes]
    names = " against ".join(dtype_name(dtype) for dtype in dtypes)
    if kinds[0] != kinds[1]:
        return Measured(exact=False, metrics=_no_metrics(), mismatch=f"kinds of dtype differ: {names}")
    warnings: tuple[str, ...] = () if dtypes[0] == dtypes[1] else (f"dtypes differ: {names}",)
    if kinds[0] == "exact":
        return _measure_exact(chunks, shape, warnings)
    rounded_to = coarser(*(_real(dtype) for dtype in dtypes)) if dtypes[0] != dtypes[1] else None
    stored, rounded = _Sums(), _Sums()
    for chunk in chunks:
        stored.add(chunk)
        if rounded_to is not None:
            rounded.add(Chunk(chunk.start, chunk.reference.to(rounded_to), chunk.candidate.to(rounded_to)))
    metrics = stored.metrics(shape)
    if metrics.nan_reference or metrics.inf_reference:
        count = f"{metrics.nan_reference} NaN and {metrics.inf_reference} Inf"
        warnings += (f"{count} in the reference, left out of the sums",)
    return Measured(
        exact=False,
        metrics=metrics,
        coarse=rounded.metrics(shape) if rounded_to is not None else None,
        row_error=stored.row_error(),
        row_norm=stored.row_norm(),
        width=stored.width,
        worst_flat=stored.worst_flat,
        first_flat=stored.mismatch_flat,
        mismatch=stored.mismatch,
        warnings=warnings,
    )


@dataclass(slots=True)
class _Sums:
    """Sums over several chunks, from the statistics of each."""

    width: int = 1
    numel: int = 0
    finite: int = 0
    absolute: float = 0.0
    square: float = 0.0
    reference_square: float = 0.0
    product: float = 0.0
    reference_sum: float = 0.0
    candidate_sum: float = 0.0
    max_abs: float = -1.0
    worst_flat: int = 0
    worst_values: tuple[float, float] = (0.0, 0.0)
    nonfinite: tuple[int, int, int, int] = (0, 0, 0, 0)
    mismatch: str | None = None
    mismatch_flat: int | None = None
    errors: list[Floats] = field(default_factory=list)
    norms: list[Floats] = field(default_factory=list)
    cosines: list[Floats] = field(default_factory=list)
    channel_square: Floats = field(default_factory=lambda: np.zeros(0))

    def add(self, chunk: Chunk) -> None:
        """Add the rows of one chunk."""
        self.width = chunk.reference.shape[1]
        self.numel += chunk.reference.numel()
        self.finite += chunk.reference.numel()
        if chunk.reference.numel() == 0:
            return
        stats = compare_pair(chunk.reference, chunk.candidate)
        counts = (stats.nan_reference, stats.nan_candidate, stats.inf_reference, stats.inf_candidate)
        if any(counts):
            self.nonfinite = tuple(map(sum, zip(self.nonfinite, counts, strict=True)))  # type: ignore[assignment]
            chunk = self._masked(chunk)
            stats = compare_pair(chunk.reference, chunk.candidate)
        self._add_sums(chunk, stats)

    def _masked(self, chunk: Chunk) -> Chunk:
        """Note where NaN and Inf do not agree, and put 0 on both sides where either is not finite."""
        reference, candidate = (side.to(torch.float64) for side in (chunk.reference, chunk.candidate))
        bad = ~(reference.isfinite() & candidate.isfinite())
        agree = (reference == candidate) | (reference.isnan() & candidate.isnan())
        wrong = (bad & ~agree).nonzero()
        if len(wrong) and self.mismatch is None:
            row, channel = wrong[0].tolist()
            values = f"{reference[row, channel].item()} against {candidate[row, channel].item()}"
            at = f"row {chunk.start + row} channel {channel}"
            self.mismatch_flat = (chunk.start + row) * self.width + channel
            self.mismatch = f"NaN or Inf in different places, first at {at}: {values}"
        self.finite -= int(bad.sum())
        return Chunk(chunk.start, reference.masked_fill(bad, 0), candidate.masked_fill(bad, 0))

    def _add_sums(self, chunk: Chunk, stats: PairStats) -> None:
        numel = chunk.reference.numel()
        norm = np.asarray(stats.row_norm, dtype=np.float64)
        error = np.where(norm > 0, np.asarray(stats.row_rel_l2) * norm, 0.0)
        empty = np.flatnonzero(norm == 0)
        if empty.size:  # the relative error says inf there; the error itself is the candidate's norm
            error[empty] = chunk.candidate[torch.from_numpy(empty)].double().norm(dim=1).numpy()
        square, reference_square = float(np.sum(error**2)), float(np.sum(norm**2))
        self.absolute += stats.mae * numel
        self.square += square
        self.reference_square += reference_square
        self.product += stats.slope * reference_square if reference_square > 0 else 0.0
        self.reference_sum += stats.mean_reference * numel
        self.candidate_sum += stats.mean_candidate * numel
        self.errors.append(error)
        self.norms.append(norm)
        self.cosines.append(np.asarray(stats.row_cosine, dtype=np.float64))
        channel = np.asarray(stats.channel_rms, dtype=np.float64) ** 2 * chunk.reference.shape[0]
        self.channel_square = channel if self.channel_square.size == 0 else self.channel_square + channel
        if stats.max_abs > self.max_abs:
            self.max_abs = stats.max_abs
            row, column = stats.max_abs_index
            self.worst_flat = (chunk.start + row) * self.width + column
            self.worst_values = (stats.max_abs_reference, stats.max_abs_candidate)

    def row_error(self) -> Floats:
        """|a - r| by row."""
        return np.concatenate(self.errors) if self.errors else np.zeros(0)

    def row_norm(self) -> Floats:
        """|r| by row."""
        return np.concatenate(self.norms) if self.norms else np.zeros(0)

    def metrics(self, shape: tuple[int, ...]) -> Metrics:
        """The metrics of everything added."""
        relative = relative_rows(self.row_error(), self.row_norm())
        cosine = np.concatenate(self.cosines) if self.cosines else np.ones(1)
        candidate_square = max(self.reference_square + 2 * (self.product - self.reference_square) + self.square, 0.0)
        both = self.reference_square + candidate_square
        worst_channel = int(self.channel_square.argmax()) if self.channel_square.size else 0
        rows = len(relative)
        return Metrics(
            numel=self.numel,
            rows=rows,
            mae=self.absolute / self.finite if self.finite else 0.0,
            rmse=math.sqrt(self.square / self.finite) if self.finite else 0.0,
            max_abs=max(self.max_abs, 0.0),
            max_abs_index=coordinates(self.worst_flat, shape),
            max_abs_reference=self.worst_values[0],
            max_abs_candidate=self.worst_values[1],
            rel_l2=_ratio(math.sqrt(self.square), math.sqrt(self.reference_square)),
            rel_diff=_ratio(self.square, both),
            cosine=float(cosine.mean()),
            cosine_min=float(cosine.min()),
            slope=self.product / self.reference_square
            if self.reference_square > 0
            else (1.0 if both == 0 else math.inf),
            mean_reference=self.reference_sum / self.finite if self.finite else 0.0,
            mean_candidate=self.candidate_sum / self.finite if self.finite else 0.0,
            nan_reference=self.nonfinite[0],
            nan_candidate=self.nonfinite[1],
            inf_reference=self.nonfinite[2],
            inf_candidate=self.nonfinite[3],
            nonfinite_match=self.mismatch is None,
            worst_row=int(relative.argmax()) if rows else 0,
            worst_row_error=float(relative.max()) if rows else 0.0,
            worst_channel=worst_channel,
            worst_channel_rms=math.sqrt(float(self.channel_square.max()) / rows) if rows else 0.0,
        )


def coordinates(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of a flat position in a tensor of that shape (no range check)."""
    found: list[int] = []
    for size in reversed(shape):
        flat, index = divmod(flat, max(size, 1))
        found.append(index)
    return tuple(reversed(found))


def _measure_exact(chunks: Iterable[Chunk], shape: tuple[int, ...], warnings: tuple[str, ...]) -> Measured:
    numel = rows = differing = first = 0
    worst, flat, values = -1.0, 0, (0, 0)
    absolute = square = reference_square = candidate_square = 0.0
    for chunk in chunks:
        # numpy compares int64 with uint64 exactly; float64 only ranks the differences
        reference, candidate = chunk.reference.numpy(), chunk.candidate.numpy()
        numel += reference.size
        rows += reference.shape[0]
        unequal = np.flatnonzero(np.not_equal(reference, candidate))
        reference_square += float(np.sum(reference.astype(np.float64) ** 2))
        candidate_square += float(np.sum(candidate.astype(np.float64) ** 2))
        if unequal.size == 0:
            continue
        ours, theirs = reference.reshape(-1)[unequal], candidate.reshape(-1)[unequal]
        gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        if not differing:
            first = chunk.start * reference.shape[1] + int(unequal[0])
        differing += int(unequal.size)
        absolute += float(gap.sum())
        square += float(np.sum(gap**2))
        place = int(gap.argmax())
        if gap[place] > worst:
            worst, flat = float(gap[place]), chunk.start * reference.shape[1] + int(unequal[place])
            values = (int(ours[place]), int(theirs[place]))
    width = shape[-1] if shape else 1
    metrics = _no_metrics(
        numel=numel,
        rows=rows,
        differing=differing,
        mae=absolute / numel if numel else 0.0,
        rmse=math.sqrt(square / numel) if numel else 0.0,
        max_abs=float(abs(values[0] - values[1])),
        max_abs_index=coordinates(flat, shape),
        max_abs_reference=values[0],
        max_abs_candidate=values[1],
        rel_l2=_ratio(math.sqrt(square), math.sqrt(reference_square)),
        rel_diff=_ratio(square, reference_square + candidate_square),
        worst_row=flat // max(width, 1),
    )
    return Measured(
        exact=True, metrics=metrics, width=max(width, 1), worst_flat=flat, first_flat=first, warnings=warnings
    )


def _no_metrics(**known: Any) -> Metrics:
    """Metrics of which only `known` were measured; cosine and slope have no meaning for integers."""
    blank: dict[str, Any] = {one.name: 0 for one in fields(Metrics)}
    blank |= {"max_abs_index": (), "cosine": math.nan, "cosine_min": math.nan, "slope": math.nan}
    blank |= {"nonfinite_match": True, "differing": None}
    return Metrics(**{**blank, **known})


def _kind(dtype: torch.dtype) -> str:
    return "exact" if is_exact(dtype) else "complex" if dtype.is_complex else "float"


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _ratio(above: float, below: float) -> float:
    if above == 0:
        return 0.0
    return above / below if below > 0 else math.inf
