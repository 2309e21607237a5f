"""Rows recorded in a worker: one copy per site and pass, handed out per request in position order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.backends.vllm.reduced import Reduced, Reduction
from trimtab.backends.vllm.step import Wanted
from trimtab.sites import Site

_MAX_PASSES = 64
_MAX_BYTES = 1 << 26

Edit = str


@dataclass(slots=True)
class _Pending:
    rows: list[Tensor] = field(default_factory=list)
    passes: list[tuple[Wanted, int]] = field(default_factory=list)
    nbytes: int = 0


Shares = list[tuple[str, Tensor | None, Tensor]]
"""Per request: which rows are its own (None: all), and their positions."""


class Recorder:
    """Keeps the rows of the requests that record them; device rows are copied to the host within their pass.

    Args:
        offsets: first column of this rank's part of a site, where it holds a part.
    """

    def __init__(self, offsets: Mapping[Site, int] | None = None) -> None:
        self._offsets = offsets or {}
        self._reductions: dict[str, Reduction] = {}
        self._reduced: dict[str, dict[tuple[Site, Edit], Reduced]] = {}
        self._pending: dict[tuple[Site, Edit], _Pending] = {}
        self._kept: dict[str, dict[tuple[Site, Edit], list[tuple[Tensor, Tensor]]]] = {}
        self.nbytes = 0

    def take(self, site: Site, edit: Edit, rows: Tensor, wanted: Wanted, shift: int) -> None:
        """Keep the rows of one site in one pass.

        Args:
            site: where.
            edit: "before" or "after" its ops.
            rows: [n, width], a copy of its own.
            wanted: whose they are.
            shift: `Step.shift` of the pass.
        """
        held = self._pending.get((site, edit))
        if held is None:
            held = self._pending[site, edit] = _Pending()
        held.rows.append(rows.cpu())
        held.passes.append((wanted, shift))
        size = rows.nbytes
        held.nbytes += size
        self.nbytes += size
        if len(held.rows) >= _MAX_PASSES or held.nbytes >= _MAX_BYTES:
            self._settle([(site, edit)])

    def _settle(self, keys: Sequence[tuple[Site, Edit]]) -> None:
        known: dict[tuple[tuple[int, int], ...], Shares] = {}
        for key in keys:
            held = self._pending.pop(key)
            same = tuple((id(wanted), shift) for wanted, shift in held.passes)
            if same not in known:
                known[same] = _shares(held.passes)
            rows = torch.cat(held.rows)
            for name, mine, positions in known[same]:
                part = rows if mine is None else rows.index_select(0, mine)
                if name in self._reductions:
                    self._reduce(name, key, part, positions)
                    continue
                self._kept.setdefault(name, {}).setdefault(key, []).append((part, positions))

    def reduce(self, req_id: str, reduction: Reduction) -> None:
        """Keep a reduction of the rows of a request instead of the rows; to be said before its first pass."""
        self._reductions[req_id] = reduction

    def _reduce(self, name: str, key: tuple[Site, Edit], part: Tensor, positions: Tensor) -> None:
        held = self._reduced.setdefault(name, {})
        if key not in held:
            held[key] = Reduced(self._reductions[name], self._offsets.get(key[0], 0))
        held[key].add(part, positions)
        self.nbytes -= part.nbytes

    def collect(self, req_id: str) -> dict[tuple[Site, Edit], tuple[Tensor, Tensor]]:
        """Return and let go of the rows of a request: (site, edit) -> rows [n, width] and positions [n], in order.

        A row that was computed twice, after a preemption, is given as it was computed last.
        """
        self._settle(list(self._pending))
        found = {key: one.result() for key, one in self._reduced.pop(req_id, {}).items()}
        self._reductions.pop(req_id, None)
        orders: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        for key, parts in self._kept.pop(req_id, {}).items():
            rows = parts[0][0] if len(parts) == 1 else torch.cat([part for part, _ in parts])
            self.nbytes -= rows.nbytes
            same = tuple(id(where) for _, where in parts)
            if same not in orders:
                orders[same] = _order(parts[0][1] if len(parts) == 1 else torch.cat([where for _, where in parts]))
            positions, order = orders[same]
            found[key] = (rows if order is None else rows[order], positions)
        return found


def _shares(passes: Sequence[tuple[Wanted, int]]) -> Shares:
    """Say which of the rows of several passes, one after another, belong to whom."""
    numbers: dict[str, int] = {}
    owners: dict[int, Tensor] = {}
    for wanted, _ in passes:
        if id(wanted) not in owners:
            mine = [numbers.setdefault(bound.req_id, len(numbers)) for bound, _ in wanted.spans]
            counts = [count for _, count in wanted.spans]
            owners[id(wanted)] = torch.repeat_interleave(torch.tensor(mine), torch.tensor(counts))
    positions = torch.cat([wanted.positions + shift for wanted, shift in passes])
    if len(numbers) == 1:
        return [(name, None, positions) for name in numbers]
    owner = torch.cat([owners[id(wanted)] for wanted, _ in passes])
    parts = torch.split(torch.argsort(owner, stable=True), torch.bincount(owner).tolist())
    return [(name, part, positions[part]) for name, part in zip(numbers, parts, strict=True)]


def _order(positions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return positions in order, each once, and the rows that they are of; None: all, as they stand."""
    if len(positions) < 2 or bool((positions[1:] > positions[:-1]).all()):
        return positions, None
    order = torch.argsort(positions, stable=True)
    positions = positions[order]
    last = torch.ones_like(positions, dtype=torch.bool)
    last[:-1] = positions[1:] != positions[:-1]
    return positions[last], order[last]
