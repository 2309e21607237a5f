"""Sharing a tensor out over the ranks of a parallel run, by index lists; what reassembly has to undo."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.compare.dims import Dims, parse_dims
from trimtab.trace import TraceWriter

At = dict[str, int]


def world(**sizes: int) -> list[At]:
    """Coordinates of every rank; the last axis runs fastest."""
    return [dict(zip(sizes, at, strict=True)) for at in itertools.product(*(range(size) for size in sizes.values()))]


def share(
    tensor: torch.Tensor, dims: str | Dims, at: At, sizes: Mapping[str, int], bounds: Sequence[int] | None = None
) -> torch.Tensor:
    """The part of a tensor that the rank at some coordinates holds; terms of a sum are weighted to add up to it."""
    parsed = parse_dims(dims) if isinstance(dims, str) else dims
    part = tensor
    for dim, axis in enumerate(parsed.axes):
        index = list(range(tensor.shape[dim]))
        for split in axis.splits:
            if split.cuts and split.coordinate in sizes:
                cuts = bounds if split.coordinate == "cp" and axis.names == ("t",) else None
                index = _held(index, split.how == "zigzag", at[split.coordinate], sizes[split.coordinate], cuts)
        part = part.index_select(dim, torch.tensor(index, dtype=torch.long))
    for split in parsed.splits():
        if split.how == "partial" and split.coordinate in sizes:
            count = sizes[split.coordinate]
            part = part * (2.0 if at[split.coordinate] == 0 else -1.0 / (count - 1)) if count > 1 else part
        if split.how == "mean" and split.coordinate in sizes:
            part = part * (1.5 if at[split.coordinate] % 2 else 0.5)
    return part.contiguous()


def _held(index: list[int], zigzag: bool, rank: int, count: int, bounds: Sequence[int] | None) -> list[int]:
    found: list[int] = []
    cuts = [0, len(index)] if bounds is None else [*bounds, len(index)]
    for start, stop in itertools.pairwise(cuts):
        mine = index[start:stop]
        chunks = 2 * count if zigzag else count
        size = -(-len(mine) // chunks)
        parts = [mine[at * size : (at + 1) * size] for at in range(chunks)]
        found += parts[rank] + (parts[2 * count - 1 - rank] if zigzag else [])
    return found


def write_run(
    path: Path,
    records: Sequence[tuple[str, torch.Tensor, Mapping[str, Any]]],
    ranks: Sequence[At],
    *,
    change: Callable[[int, str, torch.Tensor], torch.Tensor | None] | None = None,
    bounds: Sequence[int] | None = None,
    **options: Any,
) -> Path:
    """Write every rank's share of some tensors.

    Args:
        path: directory of the trace.
        records: name, whole tensor and fields; `dims` among them says how it is shared out.
        ranks: coordinates of every rank.
        change: what a rank writes in place of its share; None writes nothing.
        bounds: cumulative sequence lengths of packed tokens.
        options: of the writer.
    """
    sizes = {axis: max(at[axis] for at in ranks) + 1 for axis in ranks[0]}
    for rank, at in enumerate(ranks):
        with TraceWriter(path, provenance={}, rank=rank, **options) as writer:
            for name, tensor, fields in records:
                part = share(tensor, fields["dims"], at, sizes, bounds) if fields.get("dims") else tensor
                changed = change(rank, name, part.clone()) if change is not None else part
                if changed is not None:
                    columns = {f"{axis}_rank": index for axis, index in at.items()}
                    writer.write(name, changed, **{**columns, **fields})
    return path
