"""The full dose of the requests that ask for it: one buffer of all sites, read after each pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from trimtab.backends.vllm.bound import Bound
from trimtab.backends.vllm.counts import Counted
from trimtab.backends.vllm.step import Ints, Measured, Step
from trimtab.sites import Site

COLUMNS = ("p_before", "p_after", "cap_delta", "clamped", "ratio")
LOGITS = Site.parse("logits")
_MAX_PASSES = 64

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ops = tuple[tuple[str, int], ...]
"""Name of the site, and number of the op there: texts keep their hash, and these are looked up for every request."""


class Doses(NamedTuple):
    """What several ops did at the same rows of one request."""

    ops: Ops
    positions: Ints
    """int64 [m]."""
    values: Floats
    """[ops, m, 5]."""

    def at(self, chosen: Ints) -> Doses:
        """Return what they did at some of the rows, bool [m]."""
        return Doses(self.ops, self.positions[chosen], self.values[:, chosen])


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass measured, at the logits or at all other sites."""

    measured: Measured
    shift: int
    logits: bool
    values: Floats
    """[sites, rows, ops, 5]."""


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
        self._number = {str(site): number for number, site in enumerate(listed)}
        self._inner = len(listed) - (LOGITS in listed)
        self._buffer = torch.empty(
            (len(listed), max_rows, ops_per_site, len(COLUMNS)), dtype=torch.float32, device=device
        )
        self._on_host: Floats | None = self._buffer.numpy() if device.type == "cpu" else None  # the same memory
        self._passes: list[_Pass] = []
        self._kept: dict[str, list[Doses]] = {}
        self._listed: WeakKeyDictionary[Counted, tuple[dict[int, Ops], dict[int, Ops]]] = WeakKeyDictionary()

    def buffer(self, site: Site) -> Tensor:
        """Return what a bank fills for the rows that an op selects: float32 [max_rows, ops, 5]."""
        return self._buffer[self._number[str(site)]]

    @property
    def nbytes(self) -> int:
        """Memory of the buffer."""
        return self._buffer.nbytes

    def take(self, step: Step, *, logits: bool = False) -> None:
        """Keep what a pass measured, at the logits or at all other sites, for the requests that want it."""
        if step.measured is None:
            return
        if len(self._passes) >= _MAX_PASSES:
            self._settle()
        first, stop = (self._inner, len(self._number)) if logits else (0, self._inner)
        if self._on_host is not None:
            values = self._on_host[first:stop].take(step.measured.places, axis=1)
        else:
            values = self._buffer[first:stop].index_select(1, step.measured.rows).cpu().numpy()
        self._passes.append(_Pass(step.measured, step.shift, logits, values))

    def _settle(self) -> None:
        """Hand what was measured to the requests; passes between which only positions changed, together."""
        passes, self._passes = self._passes, []
        for _, several in groupby(passes, key=lambda one: (id(one.measured), one.logits)):
            run = list(several)
            measured, logits = run[0].measured, run[0].logits
            first = self._inner if logits else 0
            shifts = np.array([one.shift for one in run])
            selected = ~np.isnan(measured.gain)
            whole = [bool(column.all()) for column in selected.T]
            values = np.stack([one.values for one in run])  # [passes, sites, rows, ops, 5]
            picked: dict[Ops, Floats] = {}  # [ops, passes, rows, 5]; requests whose ops are at the same places share it
            row = 0
            for span in measured.spans:
                rows = slice(row, row + span.length)
                row += span.length
                listed = self._ops(span.bound, logits=logits)
                for ops in listed.values():
                    if ops not in picked:
                        sites, numbers = zip(*((self._number[site] - first, op) for site, op in ops), strict=True)
                        picked[ops] = values[:, sites, :, numbers]
                positions = (np.arange(span.start, span.start + span.length) + shifts[:, None]).ravel()
                kept = self._kept.setdefault(span.bound.req_id, [])
                for key, ops in listed.items():
                    own = np.array(picked[ops][:, :, rows], order="C")  # a view would keep what the whole batch did
                    made = Doses(ops, positions, own.reshape(len(ops), -1, len(COLUMNS)))
                    if whole[key]:
                        kept.append(made)
                    elif selected[rows, key].any():
                        kept.append(made.at(np.tile(selected[rows, key], len(shifts))))

    def _ops(self, one: Bound, *, logits: bool) -> dict[int, Ops]:
        """Return the ops of a request at the logits, or at all other sites, by the key that selects their rows."""
        if one.counted_ops is None:
            return {}
        found = self._listed.get(one.counted_ops)
        if found is None:
            listed: tuple[dict[int, list[tuple[str, int]]], ...] = ({}, {})
            for site, _, _, op, key, _ in one.counted_ops.listed:
                listed[site == str(LOGITS)].setdefault(key, []).append((site, op))
            inner, outer = ({key: tuple(ops) for key, ops in part.items()} for part in listed)
            found = self._listed[one.counted_ops] = (inner, outer)
        return found[logits]

    def collect(self, req_id: str) -> list[Doses]:
        """Return and let go of the full dose of a request."""
        self._settle()
        found: dict[Ops, list[Doses]] = {}
        for part in self._kept.pop(req_id, ()):
            found.setdefault(part.ops, []).append(part)
        return [_joined(parts) for parts in found.values()]


def _joined(parts: Sequence[Doses]) -> Doses:
    if len(parts) == 1:
        return parts[0]
    positions = np.concatenate([one.positions for one in parts])
    return Doses(parts[0].ops, positions, np.concatenate([one.values for one in parts], axis=1))
