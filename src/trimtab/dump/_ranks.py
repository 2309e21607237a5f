"""Which process this is, where it stands in the parallel layout, and how tensors are cut over it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import InputError

AXES = ("tp", "pp", "cp", "ep", "dp", "sp")
COLUMNS = ("tp", "pp", "cp", "ep", "dp")
"""Axes that records have a column for; sequence parallelism runs over the ranks of another axis."""


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and how many there are, without talking to the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def axis_name(name: str | None) -> str:
    """Return the axis that a mesh dimension stands for: `dp_shard`, `fsdp` and an unnamed one are `dp`."""
    text = (name or "dp").lower()
    for axis in AXES:
        if text == axis or text.startswith(f"{axis}_"):
            return axis
    return "dp" if text in ("fsdp", "ddp", "hsdp", "data", "replicate", "shard") else text


def coordinates(given: Any) -> dict[str, int]:
    """Return axis -> this process's index, from a DeviceMesh or a mapping.

    Raises:
        InputError: an axis that is not known, or an index that is none.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        unknown = [axis for axis in given if axis not in AXES]
        if unknown:
            raise InputError(f"coordinates have no axis {unknown[0]!r}; there are {', '.join(AXES)}")
        return {axis: int(index) for axis, index in given.items()}
    if not hasattr(given, "get_coordinate"):
        raise InputError(f"coordinates={given!r}: a DeviceMesh or a mapping of axis to index was expected")
    return _indices(given, [True] * given.ndim)


def _indices(mesh: Any, counted: Sequence[bool]) -> dict[str, int]:
    """Axis -> index along those dimensions of a mesh that are counted; dp_replicate and dp_shard are one axis."""
    found: dict[str, int] = {}
    names = mesh.mesh_dim_names or ("dp",) * mesh.ndim
    for name, size, index, counts in zip(names, mesh.shape, mesh.get_coordinate() or (), counted, strict=False):
        axis = axis_name(name)
        if axis in AXES and counts:
            found[axis] = found.get(axis, 0) * size + index
    return found


def columns(found: Mapping[str, int]) -> dict[str, int]:
    """Return the coordinates as columns of a record; `sp` is in that of `tp`, whose ranks it has."""
    placed = {"tp": found["sp"], **found} if "sp" in found else found
    return {f"{axis}_rank": placed[axis] for axis in COLUMNS if axis in placed}


class Shard(NamedTuple):
    """What dims say of this process's part of a tensor."""

    dims: str | None
    coordinates: Mapping[str, int]


WHOLE = Shard(None, {})


def local(tensor: Tensor) -> tuple[Tensor, Shard]:
    """Return this process's shard of a tensor, without its graph; a plain tensor is its own shard.

    Raises:
        InputError: it is cut in a way that dims cannot say.
    """
    if not hasattr(tensor, "to_local"):
        return _arrived(tensor.detach()), shard_of(tensor)
    distributed: Any = tensor.detach()
    return _arrived(distributed.to_local()), _described(tensor.ndim, distributed.device_mesh, distributed.placements)


def shard_of(tensor: Tensor, *, gradient: bool = False) -> Shard:
    """Return what is known of a plain tensor, or of its gradient: autograd remembers of which DTensor it is a part."""
    node: Any = None if hasattr(tensor, "to_local") else tensor.grad_fn
    spec = getattr(node, "dtensor_spec", None)
    if spec is None:
        return WHOLE
    placements = spec.placements
    if gradient:  # as DTensor has it: that of a term of a sum is whole
        whole = torch.distributed.tensor.Replicate()
        placements = node.grad_placements or tuple(whole if one.is_partial() else one for one in placements)
    try:
        return _described(tensor.ndim, spec.mesh, placements)
    except InputError:
        return WHOLE


def _described(ndim: int, mesh: Any, placements: Sequence[Any]) -> Shard:
    cuts: dict[int, list[str]] = {}
    notes: dict[str, str] = {}
    names = [axis_name(name) for name in mesh.mesh_dim_names or ("dp",) * mesh.ndim]
    # A strided shard cuts what the axes after it have cut already, as FSDP does over tensor parallelism.
    pairs = list(zip(names, placements, strict=True))
    for axis, placement in sorted(pairs, key=lambda pair: hasattr(pair[1], "split_factor")):
        if placement.is_partial():
            how = "mean" if getattr(placement, "reduce_op", "sum") == "avg" else "partial"
            notes[f"{axis}:{how}"] = axis
        elif placement.is_replicate():
            notes[f"{axis}:replicated"] = axis
        elif isinstance(getattr(placement, "dim", None), int):
            cuts.setdefault(placement.dim % ndim, []).append(axis)
        else:
            raise InputError(f"it is distributed as {placement!r}, which no dims describe")
    cutting = {axis for axes in cuts.values() for axis in axes}
    # HSDP: copies of a shard are at one place, so their coordinate counts along the axis that cuts.
    copied = {axis for note, axis in notes.items() if axis in cutting and note.endswith(":replicated")}
    counted = [axis not in copied or not one.is_replicate() for axis, one in pairs]
    kept = [note for note, axis in notes.items() if axis not in copied]
    return Shard(dims_text(ndim, cuts, kept), _indices(mesh, counted))


def _arrived(tensor: Any) -> Tensor:
    """Wait for a collective that the model has begun."""
    waited: Tensor = tensor.wait() if type(tensor).__name__ == "AsyncCollectiveTensor" else tensor
    return waited


def dims_text(ndim: int, cuts: Mapping[int, Sequence[str]], notes: Sequence[str]) -> str:
    """Return dims such as `d0[dp] d1 # tp:replicated`."""
    parts = [f"d{index}" + (f"[{','.join(cuts[index])}]" if index in cuts else "") for index in range(ndim)]
    noted = list(dict.fromkeys(notes))
    return " ".join(parts) + (f" # {' '.join(noted)}" if noted else "")
