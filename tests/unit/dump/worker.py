"""One process of the distributed tests: python worker.py CASE OUT RENDEZVOUS, with RANK and WORLD_SIZE set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from trimtab import dump

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Mlp(), Mlp())


def train(model: nn.Module, session: dump.Dump | None, shift: int = 0) -> list[torch.Tensor]:
    """Two steps; data differ by `shift`. Returns the parameters, local parts only."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    if session is not None:
        session.watch(model, optimizer)
    for step in range(2):
        torch.manual_seed(100 * shift + step)
        model(torch.randn(4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            session.step()
    return [p.to_local() if hasattr(p, "to_local") else p.detach() for p in model.parameters()]


def case(name: str, out: Path, build: object, shift: int, mesh: DeviceMesh) -> None:
    """Train with and without a dump; the parameters must be equal to the bit."""
    plain = train(build(), None, shift)
    with dump.record(out / name, coordinates=mesh) as session:
        watched = train(build(), session, shift)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True)), name


def sharded(mesh: DeviceMesh, model: nn.Module) -> nn.Module:
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(mesh: DeviceMesh, model: nn.Module) -> nn.Module:
    for block in model:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def two(out: Path) -> None:
    dp, tp = (init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in ("dp", "tp"))
    case("ddp", out, lambda: DistributedDataParallel(make()), RANK, dp)
    case("fsdp", out, lambda: sharded(dp, make()), RANK, dp)
    case("tp", out, lambda: tensor_parallel(tp, make()), 0, tp)
    # One process records and the other does not: a collective of the dumper would wait for ever.
    model = DistributedDataParallel(make())
    if RANK == 0:
        with dump.record(out / "alone", coordinates={"dp": 0, "sp": 1}) as session:
            train(model, session)
    else:
        train(model, None)


def four(out: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    build = lambda: sharded(mesh["dp_shard"], tensor_parallel(mesh["tp"], make()))  # noqa: E731
    case("both", out, build, mesh.get_coordinate()[0], mesh)
    copied = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    case("hsdp", out, lambda: sharded(copied, make()), 0, copied)
    if RANK == 0:
        with dump.record(out / "one") as session:
            train(make(), session)


if __name__ == "__main__":
    name, out, rendezvous = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=RANK, world_size=SIZE)
    {"two": two, "four": four}[name](Path(out))
    dist.barrier()
    dist.destroy_process_group()
