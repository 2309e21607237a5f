"""Where two runs first part: the smallest place among the failing rows and records."""

from __future__ import annotations

import numpy as np
import torch

from trimtab.compare._closer import ranks_at
from trimtab.compare._measured import Measured, relative_rows
from trimtab.compare.align import Aligned
from trimtab.compare.match import Pair
from trimtab.compare.measure import coordinates
from trimtab.errors import SiteError
from trimtab.results.comparison import Calibration, FirstDivergence, Number, RecordKey, RecordVerdict
from trimtab.sites import Site

Place = tuple[float | str, ...]


class FirstOf:
    """Keeps the first divergence; a failed pair comes before an inconclusive one, wherever that lies."""

    def __init__(self) -> None:
        self.found: FirstDivergence | None = None
        self._rank: tuple[bool, Place] | None = None

    def merge(self, other: FirstOf) -> None:
        """Take over what was found later in the order of pairs, where it lies before what was found so far."""
        if other._rank is not None and (self._rank is None or other._rank < self._rank):
            self.found, self._rank = other.found, other._rank

    def note(self, pair: Pair, record: RecordVerdict, aligned: Aligned | None, measured: Measured | None) -> None:
        """Consider a pair that did not pass; its values are read only when it takes the lead."""
        if record.waived_by is not None:
            return
        row = first_bad_row(measured, record.calibration) if measured is not None else 0
        position = int(pair.positions[row]) if pair.positions is not None else None
        rank = (record.status == "inconclusive", _place(record.key, record.order, position))
        if self._rank is not None and self._rank <= rank:
            return
        self._rank = rank
        index: tuple[int, ...] = ()
        values: tuple[Number | None, Number | None] = (None, None)
        error, ratio = float("inf"), None
        ranks = pair.ranks[1] if aligned is None else ()
        if aligned is not None and measured is not None and aligned.rows and aligned.comparable:
            index, flat, values = _worst_of_row(pair, aligned, measured, row)
            ranks = ranks_at(aligned, flat)
            if measured.row_error.size:
                error = float(relative_rows(measured.row_error, measured.row_norm)[row])
            if record.calibration is not None and record.calibration.expected > 0:
                ratio = error / record.calibration.expected
        self.found = FirstDivergence(
            key=record.key,
            status=record.status,
            order=record.order,
            position=position,
            index=index,
            reference=values[0],
            candidate=values[1],
            row_error=error,
            noise_ratio=ratio,
            reason="; ".join(record.reasons),
            ranks=ranks if record.key.rank is None else (),
        )


def first_bad_row(measured: Measured, calibration: Calibration | None) -> int:
    """Return the first row that shows what failed."""
    if measured.first_flat is not None:
        return measured.first_flat // measured.width
    relative = relative_rows(measured.row_error, measured.row_norm)
    if relative.size == 0:
        return 0
    limit = 0.1 * float(relative.max())
    if calibration is not None and calibration.worst > calibration.worst_limit:
        limit = calibration.worst_limit * calibration.expected
    elif calibration is not None and calibration.median > calibration.median_limit:
        limit = calibration.median_limit * calibration.expected
    elif calibration is not None and calibration.element > calibration.element_limit:
        return measured.worst_flat // measured.width
    bad = np.flatnonzero(relative >= limit)
    return int(bad[0]) if bad.size else 0


def _worst_of_row(
    pair: Pair, aligned: Aligned, measured: Measured, row: int
) -> tuple[tuple[int, ...], int, tuple[Number, Number]]:
    """Coordinates, flat position, values of the row's worst element; of the first excluded one where that decided."""
    _, reference, candidate = aligned.between(row, row + 1)
    if measured.first_flat is not None and measured.first_flat // aligned.width == row:
        channel = measured.first_flat % aligned.width
    else:
        gap = (candidate[0].double() - reference[0].double()).abs()
        channel = int(torch.nan_to_num(gap, nan=float("inf")).argmax())
    shape = aligned.shape
    flat = row * aligned.width + channel
    index = coordinates(flat, shape)
    values = (reference[0, channel].item(), candidate[0, channel].item())
    return (index[1:] if pair.positions is not None else index), flat, (_number(values[0]), _number(values[1]))


def _number(value: object) -> Number:
    assert isinstance(value, int | float)
    return int(value) if isinstance(value, bool) else value


def _place(key: RecordKey, order: int, position: int | None) -> Place:
    """Order of generations: position, then the flow of a forward pass; of dumps: step, then execution."""
    if position is None:
        return (0.0, float(key.step), float(key.micro_step), float(order), float(key.rank or 0))
    try:
        flow: Place = Site.parse(key.site).sort_key
    except SiteError:
        flow = (float("inf"), float(order), key.name)
    return (1.0, float(position), *flow, float(key.prompt or 0), str(key.request))
