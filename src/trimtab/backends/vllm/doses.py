"""The full dose of the requests that ask for it: one buffer of all sites, read after each pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.backends.vllm.step import Ints, Measured, Span, Step
from trimtab.sites import Site

COLUMNS = ("p_before", "p_after", "cap_delta", "clamped", "ratio")
LOGITS = Site.parse("logits")
_MAX_PASSES = 64


class Doses(NamedTuple):
    """What several ops did at the same rows of one request."""

    ops: tuple[tuple[Site, int], ...]
    """Site, and number of the op there."""
    positions: Tensor
    """int64 [m]."""
    values: Tensor
    """float32 [ops, m, 5]."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass measured at the sites from `first` on: [sites, rows, ops, 5]."""

    measured: Measured
    shift: int
    first: int
    values: Tensor


class DoseRecorder:
    """Keeps, per request, site and op, the positions and measurements of the rows that the op selected.

    Args:
        sites: those that have banks.
        max_rows: rows that a pass can have.
        ops_per_site: ops of one steering at one site.
        device: where the buffers lie.
    """

    def __init__(self, sites: Iterable[Site], max_rows: int, ops_per_site: int, device: torch.device) -> None:
        listed = sorted(sites, key=lambda site: site == LOGITS)
        self._number = {site: number for number, site in enumerate(listed)}
        self._inner = len(listed) - (LOGITS in self._number)
        self._shape, self._device = (len(listed), max_rows, ops_per_site, len(COLUMNS)), device
        self._buffer: Tensor | None = None
        self._passes: list[_Pass] = []
        self._kept: dict[str, list[Doses]] = {}

    def buffer(self, site: Site) -> Tensor:
        """Return what a bank fills for the rows that an op selects: float32 [max_rows, ops, 5]."""
        if self._buffer is None:
            self._buffer = torch.empty(self._shape, dtype=torch.float32, device=self._device)
        return self._buffer[self._number[site]]

    def take(self, step: Step, *, logits: bool = False) -> None:
        """Keep what a pass measured, at the logits or at all other sites, for the requests that want it."""
        if step.measured is None or self._buffer is None:
            return
        if len(self._passes) >= _MAX_PASSES:
            self._settle()
        first, stop = (self._inner, len(self._number)) if logits else (0, self._inner)
        values = self._buffer[first:stop].index_select(1, step.measured.rows).cpu()
        self._passes.append(_Pass(step.measured, step.shift, first, values))

    def _settle(self) -> None:
        """Hand what was measured to the requests; passes between which only positions changed, together."""
        passes, self._passes = self._passes, []
        for _, several in groupby(passes, key=lambda one: (id(one.measured), one.first)):
            run = list(several)
            shifts = torch.tensor([one.shift for one in run])
            values = torch.stack([one.values for one in run]).permute(1, 3, 0, 2, 4)  # [sites, ops, passes, rows, 5]
            row = 0
            for span in run[0].measured.spans:
                rows = slice(row, row + span.count)
                row += span.count
                made = self._doses(span, run[0].measured.gain[rows], shifts, values[:, :, :, rows], run[0].first)
                self._kept.setdefault(span.bound.req_id, []).extend(made)

    def _doses(self, span: Span, gain: Ints, shifts: Tensor, values: Tensor, first: int) -> Iterator[Doses]:
        """Yield what the ops of one request did, those that select by the same key together."""
        one = span.bound
        listed: dict[int, list[tuple[Site, int]]] = {}
        for site, program in (one.program or {}).items():
            if 0 <= self._number.get(site, -1) - first < len(values):
                for op, step in enumerate(program.steps):
                    listed.setdefault(one.keys[step.key], []).append((site, op))
        positions = (torch.arange(span.start, span.start + span.count) + shifts[:, None]).flatten()
        for key, ops in listed.items():
            chosen = ~np.isnan(gain[:, key])
            if not chosen.any():
                continue
            mine = values[[self._number[site] - first for site, _ in ops], [op for _, op in ops]].flatten(1, 2)
            if chosen.all():
                yield Doses(tuple(ops), positions, mine)
            else:
                where = torch.from_numpy(chosen).repeat(len(shifts))
                yield Doses(tuple(ops), positions[where], mine[:, where])

    def collect(self, req_id: str) -> list[Doses]:
        """Return and let go of the full dose of a request."""
        self._settle()
        found: dict[tuple[tuple[Site, int], ...], list[Doses]] = {}
        for part in self._kept.pop(req_id, ()):
            found.setdefault(part.ops, []).append(part)
        return [_joined(parts) for parts in found.values()]


def _joined(parts: Sequence[Doses]) -> Doses:
    if len(parts) == 1:
        return parts[0]
    positions = torch.cat([one.positions for one in parts])
    return Doses(parts[0].ops, positions, torch.cat([one.values for one in parts], dim=1))
