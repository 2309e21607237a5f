"""Three small models, in one process and shared out over gloo ranks: tensor, context and expert parallel.

python -m tests.unit.compare.parallel_models FOLDER RANK WORLD BAD_RANK
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trimtab.trace import TraceWriter

BATCH, LENGTH, HIDDEN, INNER, EXPERTS = 4, 16, 32, 64, 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)
        for seed, one in enumerate(self.parameters()):
            one.data = normal(*one.shape, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        self.inner = F.gelu(self.up(x))
        down: Tensor = self.down(self.inner)
        return down


INPUT = normal(BATCH, LENGTH, HIDDEN, seed=10)
QKV = normal(3, HIDDEN, HIDDEN, seed=11)
ROUTED = normal(EXPERTS, HIDDEN, HIDDEN, seed=12)


def attention(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    """Causal attention of the queries at some positions."""
    scores = q @ k.transpose(-1, -2) / HIDDEN**0.5
    return scores.masked_fill(torch.arange(k.shape[1]) > at[:, None], float("-inf")).softmax(-1) @ v


def single(folder: Path) -> Path:
    """Everything in one process."""
    with TraceWriter(folder, provenance={}) as writer:
        model = Mlp()
        out = model(INPUT)
        (out.square().sum() / BATCH).backward()
        writer.write("mlp.inner", model.inner, dims="b s f")
        writer.write("mlp.out", out, dims="b s h")
        for name, one in model.named_parameters():
            writer.write(f"mlp.{name}", one, kind="param")
            writer.write(f"mlp.{name}", one.grad, kind="grad")
        weights = QKV.clone().requires_grad_()
        out = attention(*(INPUT @ one for one in weights), torch.arange(LENGTH))
        out.square().sum().backward()
        writer.write("attention.out", out, dims="b s h")
        writer.write("attention.qkv", weights.grad, kind="grad")
        tokens = INPUT.reshape(-1, HIDDEN)
        experts = torch.stack([tokens @ one for one in ROUTED])
        writer.write("moe.weights", ROUTED, kind="param")
        writer.write("moe.experts", experts, dims="e t h")
        writer.write("moe.out", experts.sum(0), dims="t h")
    return folder


def shared_out(folder: Path, rank: int, world: int, bad: int) -> None:
    """One rank's part; the bad rank's weights are 3 % too large."""
    factor = 1.03 if rank == bad else 1.0
    with TraceWriter(folder, provenance={}, rank=rank) as writer:
        tensor_parallel(writer, world, factor)
        context_parallel(writer, rank, world, factor)
        expert_parallel(writer, rank, world, factor)


def tensor_parallel(writer: TraceWriter, world: int, factor: float) -> None:
    """Two ranks share every layer out, by DTensor; the others are replicas of them on other sequences."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    dp, tp = mesh.get_coordinate() or (0, 0)
    at = {"dp_rank": dp, "tp_rank": tp}
    model = Mlp()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model.up.weight.to_local().data.mul_(factor)  # type: ignore[operator]
    out = model(INPUT.chunk(world // 2)[dp])
    (out.square().sum() / (BATCH / (world // 2))).backward()
    writer.write("mlp.inner", model.inner, dims="b[dp] s f[tp]", **at)
    writer.write("mlp.out", out, dims="b[dp] s h # tp:replicated", **at)
    for name, one in model.named_parameters():
        cut = [placement.dim for placement in one.placements if placement.is_shard()]  # type: ignore[attr-defined]
        axes = " ".join(f"d{dim}[tp]" if dim in cut else f"d{dim}" for dim in range(one.ndim))
        notes = "" if cut else " tp:replicated"
        writer.write(f"mlp.{name}", one.to_local(), kind="param", dims=f"{axes} # dp:replicated{notes}", **at)  # type: ignore[operator]
        grad = one.grad.to_local()  # type: ignore[union-attr]
        writer.write(f"mlp.{name}", grad, kind="grad", dims=f"{axes} # dp:mean{notes}", **at)


def context_parallel(writer: TraceWriter, rank: int, world: int, factor: float) -> None:
    """Rank r holds chunks r and 2 n - 1 - r of the sequence, and gathers all keys and values."""
    chunks = torch.arange(LENGTH).chunk(2 * world)
    mine = torch.cat([chunks[rank], chunks[2 * world - 1 - rank]])
    order = torch.cat([torch.cat([chunks[r], chunks[2 * world - 1 - r]]) for r in range(world)])
    weights = QKV.clone().requires_grad_()
    q, k, v = (INPUT[:, mine] @ one for one in weights)
    gathered = []
    for part in (k, v):
        parts = [torch.empty_like(part) for _ in range(world)]
        dist.all_gather(parts, part.detach())
        parts[rank] = part
        gathered.append(torch.cat(parts, 1)[:, order.argsort()])
    out = attention(q * factor, gathered[0], gathered[1], mine)
    writer.write("attention.out", out, dims="b s[cp:zigzag] h", cp_rank=rank)
    whole = QKV.clone().requires_grad_()  # what this rank's queries give to every weight
    at = attention(INPUT[:, mine] @ whole[0] * factor, INPUT @ whole[1], INPUT @ whole[2], mine)
    at.square().sum().backward()
    writer.write("attention.qkv", whole.grad, kind="grad", dims="n i o # cp:partial", cp_rank=rank)


def expert_parallel(writer: TraceWriter, rank: int, world: int, factor: float) -> None:
    """Every rank has some of the experts; what they make of a token is summed over the ranks."""
    mine = ROUTED.chunk(world)[rank] * factor
    experts = torch.stack([INPUT.reshape(-1, HIDDEN) @ one for one in mine])
    total = experts.sum(0)
    dist.all_reduce(total)
    writer.write("moe.weights", mine, kind="param", dims="e[ep] i o", ep_rank=rank)
    writer.write("moe.experts", experts, dims="e[ep] t h", ep_rank=rank)
    writer.write("moe.out", total, dims="t h # ep:replicated", ep_rank=rank)


def main(folder: str, rank: str, world: str, bad: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=int(rank), world_size=int(world))
    for name, wrong in (("good", -1), ("bad", int(bad))):
        shared_out(Path(folder) / name, int(rank), int(world), wrong)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
