"""Measure one aligned pair in chunks: type-correct, float64 sums, memory that does not grow with the pair.

`numerics.pair.compare_pair` does the work. Integers and booleans are compared exactly, complex numbers as pairs of
floats, NaN and Inf by position; what is not finite stays out of the sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from trimtab.compare._measured import Floats, Measured, energy, relative_rows
from trimtab.numerics.dtypes import coarser, dtype_name, round_to
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
        return Measured(exact=False, metrics=_Sums().metrics(shape), mismatch=f"kinds of dtype differ: {names}")
    warnings: tuple[str, ...] = () if dtypes[0] == dtypes[1] else (f"dtypes differ: {names}",)
    exact = kinds[0] == "exact"
    rounded_to = None if exact or dtypes[0] == dtypes[1] else coarser(*(_real(dtype) for dtype in dtypes))
    stored, rounded = _Sums(), _Sums()
    for chunk in chunks:
        stored.add(chunk)
        if rounded_to is not None:
            rounded.add(
                Chunk(chunk.start, round_to(chunk.reference, rounded_to), round_to(chunk.candidate, rounded_to))
            )
    metrics = stored.metrics(shape)
    if metrics.nan_reference or metrics.inf_reference:
        count = f"{metrics.nan_reference} NaN and {metrics.inf_reference} Inf"
        warnings += (f"{count} in the reference, left out of the sums",)
    if exact:
        metrics = dataclasses.replace(metrics, differing=stored.unequal)
    return Measured(
        exact=exact,
        metrics=metrics,
        mean_error=stored.error_sum / stored.finite if stored.finite else 0.0,
        coarse=rounded.metrics(shape) if rounded_to is not None else None,
        row_error=stored.row_error(),
        row_norm=stored.row_norm(),
        channel_error=stored.channel_error(),
        width=stored.width,
        worst_flat=stored.worst_flat,
        first_flat=stored.first_flat,
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
    error_sum: float = 0.0
    unequal: int = 0
    max_abs: float = -1.0
    worst_flat: int = 0
    worst_values: tuple[float, float] = (0.0, 0.0)
    nonfinite: tuple[int, int, int, int] = (0, 0, 0, 0)
    mismatch: str | None = None
    first_flat: int | None = None
    errors: list[Floats] = field(default_factory=list)
    norms: list[Floats] = field(default_factory=list)
    cosines: list[Floats] = field(default_factory=list)
    only: PairStats | None = None
    """The statistics, where one chunk is all."""
    channel_square: Floats = field(default_factory=lambda: np.zeros(0))

    def add(self, chunk: Chunk) -> None:
        """Add the rows of one chunk."""
        self.width = chunk.reference.shape[1]
        if chunk.reference.numel() == 0:
            return
        stats = compare_pair(chunk.reference, chunk.candidate, count_unequal=is_exact(chunk.reference.dtype))
        if self.first_flat is None and (not stats.nonfinite_match or (stats.exact and stats.unequal)):
            self._locate(chunk, stats.exact)
        self._add(chunk.start, stats)

    def _locate(self, chunk: Chunk, exact: bool) -> None:
        """Note the first difference that no tolerance excuses."""
        if exact:  # numpy compares signed with unsigned integers exactly
            wrong = np.flatnonzero(np.not_equal(chunk.reference.numpy(), chunk.candidate.numpy()))
            row, channel = divmod(int(wrong[0]), self.width)
        else:
            reference, candidate = (side.to(torch.float64) for side in (chunk.reference, chunk.candidate))
            agree = (reference == candidate) | (reference.isnan() & candidate.isnan())
            bad = ~(agree | (reference.isfinite() & candidate.isfinite()))
            row, channel = bad.nonzero()[0].tolist()
            values = f"{reference[row, channel].item()} against {candidate[row, channel].item()}"
            at = f"row {chunk.start + row} channel {channel}"
            self.mismatch = f"NaN or Inf in different places, first at {at}: {values}"
        self.first_flat = (chunk.start + row) * self.width + channel

    def _add(self, start: int, stats: PairStats) -> None:
        norm, error = stats.row_norm, stats.row_error
        self.only = None if self.errors else stats
        reference_square = energy(norm)
        counts = (stats.nan_reference, stats.nan_candidate, stats.inf_reference, stats.inf_candidate)
        self.numel += stats.numel
        self.unequal += stats.unequal or 0
        if any(counts):
            self.nonfinite = tuple(map(sum, zip(self.nonfinite, counts, strict=True)))  # type: ignore[assignment]
        self.square += energy(error)
        self.reference_square += reference_square
        self.product += stats.slope * reference_square if reference_square > 0 else 0.0
        # exact where NaN and Inf agree; where they do not the pair fails anyway
        finite = stats.numel - max(counts[0] + counts[2], counts[1] + counts[3])
        self.finite += finite
        self.absolute += stats.mae * finite
        self.reference_sum += stats.mean_reference * finite
        self.error_sum += stats.mean_error * finite
        self.errors.append(error)
        self.norms.append(norm)
        self.cosines.append(stats.row_cosine)
        channel = stats.channel_rms**2 * stats.rows
        self.channel_square = channel if self.channel_square.size == 0 else self.channel_square + channel
        if stats.max_abs > self.max_abs:
            self.max_abs = stats.max_abs
            row, column = stats.max_abs_index
            self.worst_flat = (start + row) * self.width + column
            self.worst_values = (stats.max_abs_reference, stats.max_abs_candidate)

    def row_error(self) -> Floats:
        """|a - r| by row."""
        if self.only is not None:
            return self.only.row_error
        return np.concatenate(self.errors) if self.errors else np.zeros(0)

    def row_norm(self) -> Floats:
        """|r| by row."""
        if self.only is not None:
            return self.only.row_norm
        return np.concatenate(self.norms) if self.norms else np.zeros(0)

    def channel_error(self) -> Floats:
        """Rms of a - r by channel."""
        if self.only is not None:
            return self.only.channel_rms
        return np.sqrt(self.channel_square / max(len(self.row_norm()), 1))

    def metrics(self, shape: tuple[int, ...]) -> Metrics:
        """The metrics of everything added."""
        relative = relative_rows(self.row_error(), self.row_norm())
        if self.only is not None:
            cosines = (self.only.cosine, self.only.cosine_min)
        else:
            cosine = np.concatenate(self.cosines) if self.cosines else np.ones(1)
            cosines = (float(cosine.mean()), float(cosine.min()))
        candidate_square = max(self.reference_square + 2 * (self.product - self.reference_square) + self.square, 0.0)
        both = self.reference_square + candidate_square
        rows, channel, row = len(relative), 0, 0
        worst = channel_worst = 0.0
        if rows:
            row = int(relative.argmax())
            worst = float(relative[row])
        if rows and self.channel_square.size:
            channel = int(self.channel_square.argmax())
            channel_worst = math.sqrt(float(self.channel_square[channel]) / rows)
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
            cosine=cosines[0],
            cosine_min=cosines[1],
            slope=self.product / self.reference_square
            if self.reference_square > 0
            else (1.0 if both == 0 else math.inf),
            mean_reference=self.reference_sum / self.finite if self.finite else 0.0,
            mean_candidate=(self.reference_sum + self.error_sum) / self.finite if self.finite else 0.0,
            nan_reference=self.nonfinite[0],
            nan_candidate=self.nonfinite[1],
            inf_reference=self.nonfinite[2],
            inf_candidate=self.nonfinite[3],
            nonfinite_match=self.mismatch is None,
            worst_row=row,
            worst_row_error=worst,
            worst_channel=channel,
            worst_channel_rms=channel_worst,
        )


def coordinates(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of a flat position in a tensor of that shape (no range check)."""
    found: list[int] = []
    for size in reversed(shape):
        flat, index = divmod(flat, max(size, 1))
        found.append(index)
    return tuple(reversed(found))


@functools.cache
def _kind(dtype: torch.dtype) -> str:
    return "exact" if is_exact(dtype) else "complex" if dtype.is_complex else "float"


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _ratio(above: float, below: float) -> float:
    if above == 0:
        return 0.0
    return above / below if below > 0 else math.inf
