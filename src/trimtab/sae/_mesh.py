"""Tensors of which every process of a mesh of one dimension has a part, shared out as DTensor and FSDP2 do."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def part_of(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the rows that this process holds."""
    parts = whole.chunk(mesh.size())
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]


def joined(local: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """Return the whole of a tensor of which every process has a part, on the CPU."""
    length = torch.tensor(local.shape[dim], device=mesh.device_type)
    dist.all_reduce(length, group=mesh.get_group())
    shape = torch.Size([*local.shape[:dim], int(length), *local.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    placed = DTensor.from_local(
        local.to(mesh.device_type).contiguous(), mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride
    )
    return placed.full_tensor().cpu()
