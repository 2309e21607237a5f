"""A small transformer trained in one process, and shared out over gloo ranks in the usual ways, under a dump.

python -m tests.integration.parallel_training FOLDER RANK LAYOUT,LAYOUT,...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from trimtab import dump

WIDTH, HEADS, INNER, EXPERTS, WORDS, BATCH, LENGTH, STEPS, RANKS = 32, 4, 64, 4, 48, 4, 16, 2, 2


class Gathered(torch.autograd.Function):
    """The sequence of all ranks, in order of the ranks; gradients come back to the rank that had the tokens."""

    @staticmethod
    def forward(_: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(RANKS)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.chunk(RANKS, 1)[dist.get_rank()]


class Summed(torch.autograd.Function):
    """The sum over ranks; the gradient goes to each as it is."""

    @staticmethod
    def forward(_: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


class Spread(torch.autograd.Function):
    """The same on every rank; the gradient is the sum of theirs."""

    @staticmethod
    def forward(_: Any, whole: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return Summed.apply(gradient)  # type: ignore[no-any-return]


class Core(nn.Module):
    """Causal attention of the queries at some positions to keys at all."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for one in (q, k, v))
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        late = torch.arange(k.shape[2]) > at[:, None]
        return (scores.masked_fill(late, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.core = Core()
        self.order: Tensor | None = None  # of the tokens of all ranks, where a rank has only some

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.order is not None:
            k, v = (Gathered.apply(one)[:, self.order] for one in (k, v))
        out: Tensor = self.out(self.core(q, k, v, at))
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.act(self.up(x)))
        return down


class Experts(nn.Module):
    """What each expert makes of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / INNER**0.5)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (one.to_local() if isinstance(one, DTensor) else one for one in (self.up, self.down))
        return F.gelu(x @ up) @ down


class Moe(nn.Module):
    """Every expert sees every token, and the router weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), Experts()
        self.mine: slice | None = None  # the experts of this rank

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights = self.router(tokens).softmax(-1)
        if self.mine is None:
            return torch.einsum("eth,te->th", self.experts(tokens), weights).view_as(x)
        tokens, weights = Spread.apply(tokens), Spread.apply(weights)
        part = torch.einsum("eth,te->th", self.experts(tokens), weights[:, self.mine])
        return Summed.apply(part).view_as(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, moe: bool) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = Moe() if moe else Mlp()

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), at)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """A stage of a pipeline has only some of the parts, and passes the hidden state on."""

    def __init__(self, moe: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed: nn.Module | None = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleDict({str(number): Block(moe) for number in range(2)})
        self.norm: nn.Module | None = nn.LayerNorm(WIDTH)
        self.head: nn.Module | None = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        x = tokens if self.embed is None else self.embed(tokens)
        for block in self.blocks.values():
            x = block(x, at)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def batch(step: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(WORDS, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plant(model: nn.Module, path: str) -> None:
    """From here on a module returns 5 % too much."""
    module = model.get_submodule(path)
    right = module.forward
    module.forward = lambda *args: right(*args) * 1.05  # type: ignore[method-assign]


Step = Callable[[nn.Module, int], None]


def plainly(model: nn.Module, step: int) -> None:
    tokens, labels = batch(step)
    loss_of(model(tokens, torch.arange(LENGTH)), labels).backward()


def record(folder: Path, model: nn.Module, step: Step, coordinates: Any = None) -> None:
    """Train under a dump."""
    # With a small eps the first update is the sign of the gradient, also where that is rounding; with one far above the
    # gradients it is nearly linear in them.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-2, foreach=False)
    with dump.record(folder, coordinates=coordinates) as session:
        session.watch(model, optimizer)
        for number in range(STEPS):
            step(model, number)
            optimizer.step()
            optimizer.zero_grad()
            session.step()


def single(folder: Path) -> None:
    """The dense model and the one with experts in one process."""
    record(folder / "dense", Model(), plainly)
    record(folder / "moe", Model(moe=True), plainly)


def data_parallel(folder: Path, rank: int, bug: str) -> None:
    """Each rank has half of the sequences."""

    def step(model: nn.Module, number: int) -> None:
        tokens, labels = (one.chunk(RANKS)[rank] for one in batch(number))
        loss_of(model(tokens, torch.arange(LENGTH)), labels).backward()

    model = Model()
    if bug:
        plant(model, bug)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
    record(folder, DistributedDataParallel(model), step, mesh)


def tensor_parallel(folder: Path, rank: int, bug: str) -> None:
    """Each rank has half of the heads and of the inner width."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    model = Model()
    styles = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    styles |= {"attention.out": RowwiseParallel(), "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    for block in model.blocks.values():
        parallelize_module(block, mesh, styles)
    if bug:
        plant(model, bug)
    record(folder, model, plainly, mesh)


def sequence_parallel(folder: Path, rank: int, bug: str) -> None:
    """Tensor parallelism, and half of the tokens on each rank between."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    model, part = Model(), Shard(1)
    styles: dict[str, Any] = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    styles |= {"attention.out": RowwiseParallel(output_layouts=part), "mlp.up": ColwiseParallel()}
    styles |= {
        "mlp.down": RowwiseParallel(output_layouts=part),
        "norm1": SequenceParallel(),
        "norm2": SequenceParallel(),
    }
    styles["attention"] = PrepareModuleInput(input_layouts=(part, None), desired_input_layouts=(Replicate(), None))
    styles["mlp"] = PrepareModuleInput(input_layouts=(part,), desired_input_layouts=(Replicate(),))
    for block in model.blocks.values():
        parallelize_module(block, mesh, styles)
    ends = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=part),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=part, output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    if bug:
        plant(model, bug)
    record(folder, model, plainly, mesh)


def context_parallel(folder: Path, rank: int, bug: str) -> None:
    """Rank r has chunks r and 2 n - 1 - r of each sequence; keys and values are gathered."""
    chunks = torch.arange(LENGTH).chunk(2 * RANKS)
    mine = [torch.cat([chunks[one], chunks[2 * RANKS - 1 - one]]) for one in range(RANKS)]
    at = mine[rank]

    def step(model: nn.Module, number: int) -> None:
        tokens, labels = (one[:, at] for one in batch(number))
        (loss_of(model(tokens, at), labels) / RANKS).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)

    model = Model()
    for block in model.blocks.values():
        block.attention.order = torch.cat(mine).argsort()
    if bug:
        plant(model, bug)
    record(folder, model, step, {"cp": rank})


def expert_parallel(folder: Path, rank: int, bug: str) -> None:
    """Each rank has half of the experts; what they make of a token is summed."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("ep",))
    model = Model(moe=True)
    share = EXPERTS // RANKS
    for block in model.blocks.values():
        block.mlp.mine = slice(rank * share, (rank + 1) * share)
        experts = block.mlp.experts
        for name, weight in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)])))
    if bug:
        plant(model, bug)
    record(folder, model, plainly, mesh)


def pipeline_parallel(folder: Path, rank: int, bug: str) -> None:
    """Each rank has half of the layers, and passes the hidden state on."""
    model = Model()
    del model.blocks[str(1 - rank)]
    if rank == 0:
        model.norm = model.head = None
    else:
        model.embed = None

    def step(model: nn.Module, number: int) -> None:
        tokens, labels = batch(number)
        at = torch.arange(LENGTH)
        passed = torch.empty(BATCH, LENGTH, WIDTH)
        if rank == 0:
            hidden = model(tokens, at)
            dist.send(hidden.detach(), 1)
            dist.recv(passed, 1)
            hidden.backward(passed)
        else:
            dist.recv(passed, 0)
            loss_of(model(passed.requires_grad_(), at), labels).backward()
            dist.send(passed.grad, 0)

    if bug and rank == 1:
        plant(model, bug)
    record(folder, model, step, {"pp": rank})


@dataclass(frozen=True)
class Layout:
    """A way to share the model out."""

    run: Callable[[Path, int, str], None]
    bug: str
    """The module that is wrong on the last rank in the second run."""
    reference: str = "dense"
    dims: tuple[str, ...] = ()
    """What no DTensor says."""


SIDES = "(input|output|grad_output)"
SHARES = (  # at the places between modules where tensor parallelism leaves plain tensors
    rf"module:.*attention\.core\.{SIDES}: b s h[tp]",
    rf"module:.*mlp\.act\.{SIDES}: b s f[tp]",
)
SEQUENCES = (
    "tokens: b[dp] s",
    "loss: # dp:mean",
    "module:embed.input: b[dp] s",
    f".*{SIDES}: b[dp:sharded+mean] s h",  # a rank's loss is that of its sequences
)
CHUNKS = (
    "tokens|module:embed.input: b s[cp:zigzag]",
    "at|.*input: s[cp:zigzag]",
    "loss: # cp:partial",
    r"module:.*attention\.core\.input\.[12]: b s h",
    f".*{SIDES}: b s[cp:zigzag] h",
)
LAYOUTS: Mapping[str, Layout] = {
    "ddp": Layout(data_parallel, "blocks.1.mlp.act", dims=SEQUENCES),
    "tp": Layout(tensor_parallel, "blocks.1.mlp.act", dims=SHARES),
    "sp": Layout(
        sequence_parallel,
        "blocks.1.mlp.act",
        dims=(*SHARES, r"module:blocks\.\d\.(input|output|grad_output): b s[sp] h"),
    ),
    "cp": Layout(context_parallel, "blocks.1.attention.core", dims=CHUNKS),
    "ep": Layout(expert_parallel, "blocks.1.mlp.experts", "moe", ("module:.*experts.(output|grad_output): e[ep] t h",)),
    "pp": Layout(pipeline_parallel, "blocks.1.mlp.act"),
}


def main(folder: str, rank: str, layouts: str) -> None:
    torch.set_num_threads(1)
    number = int(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{layouts}", rank=number, world_size=RANKS)
    for name in layouts.split(","):
        one = LAYOUTS[name]
        one.run(Path(folder) / f"{name}-good", number, "")
        one.run(Path(folder) / f"{name}-bad", number, one.bug if number == RANKS - 1 else "")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
