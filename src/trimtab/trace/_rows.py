"""Gathering the rows of one generation request from its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch

from trimtab.errors import TraceError

_KEYS = ("config", "prompt", "request", "edit")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Rows of one request at one site.

    `values` is [n, d] in the stored dtype, `positions` [n] int64 ascending, `record_ids` the records they came from.
    """

    values: torch.Tensor
    positions: torch.Tensor
    record_ids: tuple[int, ...]


def gather(
    found: pl.DataFrame,
    everything: pl.DataFrame,
    given: Mapping[str, Any],
    read: Callable[[int], torch.Tensor],
    path: str,
) -> Rows:
    """Join the records in `found` in position order.

    Args:
        found: records that match `given`, with their positions.
        everything: all records with positions, to say what exists when none matches.
        given: what was asked for.
        read: record id -> values.
        path: the run, for messages.

    Raises:
        TraceError: no record, several requests, or two records that disagree about a position.
    """
    _check_one(found, everything, given, path)
    ids: list[int] = found["record_id"].to_list()
    lists: list[list[int]] = found["positions"].to_list()
    parts = [read(one) for one in ids]
    for record, part, positions in zip(ids, parts, lists, strict=True):
        if part.dtype != parts[0].dtype or part.shape[1:] != parts[0].shape[1:] or len(part) != len(positions):
            raise TraceError(
                f"{path}: record {record} ({part.dtype} {list(part.shape)}, {len(positions)} positions) does not "
                f"continue record {ids[0]} ({parts[0].dtype} {list(parts[0].shape)})"
            )
    where = torch.tensor([position for positions in lists for position in positions], dtype=torch.int64)
    if len(parts) == 1 and bool((where[1:] > where[:-1]).all()):
        return Rows(values=parts[0], positions=where, record_ids=tuple(ids))
    owners = torch.tensor([at for at, positions in enumerate(lists) for _ in positions], dtype=torch.int64)
    order = torch.argsort(where, stable=True)
    values, where, owners = torch.cat(parts)[order], where[order], owners[order]
    repeated = where[1:] == where[:-1]
    if bool(repeated.any()):
        _check_equal(values, where, repeated, [ids[at] for at in owners.tolist()], path)
        keep = torch.cat([torch.ones(1, dtype=torch.bool), ~repeated])
        values, where = values[keep], where[keep]
    return Rows(values=values, positions=where, record_ids=tuple(ids))


def _check_equal(
    values: torch.Tensor, where: torch.Tensor, repeated: torch.Tensor, owners: list[int], path: str
) -> None:
    raw = values.contiguous().reshape(len(values), -1).view(torch.uint8)
    for at in torch.nonzero(repeated).flatten().tolist():
        if not torch.equal(raw[at], raw[at + 1]):
            raise TraceError(
                f"{path}: records {owners[at]} and {owners[at + 1]} hold different values for position "
                f"{int(where[at])} of one request; one of them is from another run or step"
            )


def _check_one(found: pl.DataFrame, everything: pl.DataFrame, given: Mapping[str, Any], path: str) -> None:
    asked = ", ".join(f"{name}={value!r}" for name, value in given.items())
    groups = found.select(_KEYS).unique(maintain_order=True)
    if groups.height == 1:
        return
    if not groups.height:
        exists = "; ".join(f"{name}: {_listed(everything, name)}" for name in ("site", *_KEYS))
        raise TraceError(f"{path} has no rows with {asked}; there are {exists}")
    several = [name for name in _KEYS if groups[name].n_unique() > 1]
    choices = "; ".join(f"{name}: {_listed(groups, name)}" for name in several)
    raise TraceError(f"{path}: {asked} fits {groups.height} requests; say which: {choices}")


def _listed(frame: pl.DataFrame, name: str) -> str:
    values = frame[name].unique(maintain_order=True).to_list()
    shown = ", ".join(repr(value) for value in values[:8])
    return (shown or "none") + (f" and {len(values) - 8} more" if len(values) > 8 else "")
