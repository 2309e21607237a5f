"""What comes back of a request: the reports that callers get, made of what every worker holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
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


class Report(msgspec.Struct, frozen=True, gc=False):
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
    full: Mapping[tuple[str, int], tuple[tuple[int, ...], Tensor]] = {}
    """(site, op number) -> positions and [m, 5]: p_before, p_after, cap_delta, clamped, ratio."""
    nonfinite_logits: bool = False
    """Whether the logits of some token were not finite; looked for where `check_logits` asked for it."""


class Part(msgspec.Struct, frozen=True, gc=False):
    """What one worker holds of a request."""

    result: Result
    document: dict[str, Any]
    """What it came with."""
    tensors: dict[str, Tensor]
    names: Names
    """The ops that this worker counts."""
    counts: Ints
    """What they did, int64 [ops, 4]; see `OpReports`."""


def merged(parts: Sequence[Part], widths: Mapping[Site, int]) -> Report:
    """Return one request as all workers saw it; replicated ranks agree, and the first one is kept."""
    first, ops = parts[0].result, _counted(parts)
    return Report(
        first.label,
        first.req_id,
        first.digest,
        first.prompt_length,
        first.rows,
        first.cached,
        (first.problems if len(parts) == 1 else _problems(parts)) + passed_by(ops),
        ops,
        _captured(parts, widths),
        _full(parts),
        any([part.result.nonfinite_logits for part in parts]),
    )


def _problems(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(part.result.problems for part in parts)))


def passed_by(ops: OpReports) -> tuple[str, ...]:
    """Return the ops that acted on fewer rows than their positions select; logits are drawn from some rows only."""
    if not (ops.values[:, 0] < ops.values[:, 3]).any():
        return ()
    return tuple(
        f"{one.op} at {one.site} acted on {one.rows} rows of the {one.selected} that its positions select"
        for one in ops
        if one.selected is not None and one.rows < one.selected and one.site != "logits"
    )


def _counted(parts: Sequence[Part]) -> OpReports:
    """Return what the ops did: pipeline stages hold other sites, tensor-parallel ranks count the same."""
    if len(parts) == 1:
        return OpReports(parts[0].names, parts[0].counts.copy())  # a view would keep those of all requests
    stages: dict[Names, Ints] = {}
    for part in parts:
        stages.setdefault(part.names, part.counts)
    return OpReports(tuple(chain.from_iterable(stages)), np.concatenate(list(stages.values())))


def _captured(parts: Sequence[Part], widths: Mapping[Site, int]) -> tuple[CapturedRows, ...]:
    found: dict[tuple[str, str], CapturedRows] = {}
    for part in parts:
        result, document = part.result, part.document
        for one in result.captured:
            key, offset = (one["site"], one["edit"]), one["offset"]
            if offset is None and key in found:
                continue
            site, rows = Site.parse(one["site"]), _rows(one, part.tensors)
            if offset is not None:
                added = result.reduce == "projection"  # a projection is the sum of those of the parts
                width = rows.shape[1] if added else widths[site]
                rows = _assembled(found.get(key), rows, 0 if added else offset, width)
            where = document["positions"][one["positions"]]
            found[key] = CapturedRows(site, one["edit"], rows, where, one["module"], document["pp_rank"], result.reduce)
    return tuple(found.values())


def _assembled(known: CapturedRows | None, rows: Tensor, offset: int, width: int) -> Tensor:
    """Put the columns of one tensor-parallel rank into the whole."""
    whole = rows.new_zeros(rows.shape[0], width) if known is None else known.rows
    whole[:, offset : offset + rows.shape[1]] += rows
    return whole


def _full(parts: Sequence[Part]) -> dict[tuple[str, int], tuple[tuple[int, ...], Tensor]]:
    found: dict[tuple[str, int], tuple[tuple[int, ...], Tensor]] = {}
    for part in parts:
        document = part.document
        for one in part.result.full:
            where, pairs = document["positions"][one["positions"]], document["pairs"][one["pairs"]]
            values = _rows(one, part.tensors).view(len(pairs), len(where), -1).unbind()
            for (site, number), own in zip(pairs, values, strict=True):
                found.setdefault((site, number), (where, own))
    return found


def _rows(place: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """Return the rows of one request, a copy: a view would keep those of all requests that came with it."""
    name, first, end = place["rows"]
    return tensors[name][first:end].clone()
