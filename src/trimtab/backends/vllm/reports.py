"""What comes back of a request: the reports that callers get, made of what every worker holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from trimtab.backends.vllm.counts import NOTHING, Ints, Names, OpReport, OpReports
from trimtab.backends.vllm.reduced import Kind
from trimtab.backends.vllm.wire import Result
from trimtab.sites import Site


@dataclass(frozen=True, slots=True)
class CapturedRows:
    """Rows of one site: [n, width], and their absolute positions."""

    site: Site
    edit: str
    rows: Tensor
    positions: tuple[int, ...]
    module_path: str | None
    pp_rank: int
    reduce: Kind = ""
    """What `rows` holds: the rows at `positions`, or a reduction of them."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came back of one request, or of one child of a request with n > 1."""

    label: str
    request_id: str
    """The engine's own id."""
    digest: str | None
    """Digest of the steering that acted; None for an unsteered request."""
    prompt_length: int
    rows: int
    """Rows known to the engine: computed, or taken from the prefix cache."""
    cached: int
    """Rows of the prompt that came from the prefix cache."""
    problems: tuple[str, ...] = ()
    """Why ops did not act where they should have; empty when all is well."""
    ops: Sequence[OpReport] = NOTHING
    captured: tuple[CapturedRows, ...] = ()
    full: Mapping[tuple[str, int], tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    """(site, op number) -> positions and [m, 5]: p_before, p_after, cap_delta, clamped, ratio."""
    nonfinite_logits: bool = False
    """Whether the logits of some token were not finite; looked for where `check_logits` asked for it."""


class Merge:
    """One request as all workers saw it."""

    def __init__(self, result: Result) -> None:
        self._first = result
        self._ranks: dict[int, int] = {}
        self._problems: dict[str, None] = {}
        self._nonfinite = False
        self._ops: dict[Names, Ints] = {}
        self._captured: dict[tuple[str, str], CapturedRows] = {}
        self._full: dict[tuple[str, int], tuple[tuple[int, ...], Tensor]] = {}

    def add(
        self, result: Result, document: dict[str, Any], tensors: dict[str, Tensor], widths: Mapping[Site, int]
    ) -> None:
        """Take what one worker holds; replicated ranks agree, and the first one is kept."""
        self._problems |= dict.fromkeys(result.problems)
        self._nonfinite |= result.nonfinite_logits
        self._ranks[document["engine"]] = self._ranks.get(document["engine"], 0) + 1
        for one in result.full:
            where = document["positions"][one["positions"]]
            pairs = document["pairs"][one["pairs"]]
            parts = _rows(one, tensors).view(len(pairs), len(where), -1).unbind()
            for (site_text, number), values in zip(pairs, parts, strict=True):
                self._full.setdefault((site_text, number), (where, values))
        for one in result.captured:
            site, rows = Site.parse(one["site"]), _rows(one, tensors)
            key = (one["site"], one["edit"])
            if one["offset"] is not None:
                added = result.reduce == "projection"  # a projection is the sum of those of the parts
                rows = self._assemble(
                    key, rows, 0 if added else one["offset"], rows.shape[1] if added else widths[site]
                )
            place = CapturedRows(
                site,
                one["edit"],
                rows,
                document["positions"][one["positions"]],
                one["module"],
                document["pp_rank"],
                result.reduce,
            )
            if one["offset"] is not None or key not in self._captured:
                self._captured[key] = place

    def count(self, names: Names, values: Ints) -> None:
        """Take what the ops of one worker did: other stages hold other sites, other ranks count the same."""
        if names:
            self._ops.setdefault(names, values)

    def lacks(self, ranks: Mapping[int, int]) -> bool:
        """Whether some workers of an engine have nothing of a request that others of it have."""
        return any(ranks[engine] != count for engine, count in self._ranks.items())

    def _assemble(self, key: tuple[str, str], rows: Tensor, offset: int, width: int) -> Tensor:
        """Put the columns of one tensor-parallel rank into the whole."""
        known = self._captured.get(key)
        whole = rows.new_zeros(rows.shape[0], width) if known is None else known.rows
        whole[:, offset : offset + rows.shape[1]] += rows
        return whole

    def _counted(self) -> OpReports:
        if not self._ops:
            return NOTHING
        if len(self._ops) == 1:  # one pipeline stage
            ((names, values),) = self._ops.items()
            return OpReports(names, values.copy())
        return OpReports(tuple(chain.from_iterable(self._ops)), np.concatenate([NOTHING.values, *self._ops.values()]))

    def report(self) -> Report:
        """Return the request as one."""
        first = self._first
        return Report(
            first.label,
            first.req_id,
            first.digest,
            first.prompt_length,
            first.rows,
            first.cached,
            tuple(self._problems),
            self._counted(),
            tuple(self._captured.values()),
            self._full,
            self._nonfinite,
        )


def _rows(place: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """Return the rows of one request, a copy: a view would keep those of all requests that came with it."""
    name, first, end = place["rows"]
    return tensors[name][first:end].clone()
