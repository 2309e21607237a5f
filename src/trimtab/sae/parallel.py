"""Several processes on one training: they share the tokens of a batch, the latents of each SAE, or both.

Launched by torchrun, N processes form a mesh of N / T x T. T processes hold a range of the latents each (their rows
of W_enc and W_dec, their biases, thresholds, moments and counters) and see the same tokens; N / T such groups see
different tokens of every batch. Each step then is the one that a single process would take, up to the order of sums:

    TopK      every process ranks its own latents; their candidates are gathered, the k-th of all is the cut
    decode    partial reconstructions are summed over the latents' processes
    b_dec     what comes through the encoder is summed over the latents' processes
    gradient  averaged over the tokens' processes; its length is taken over all

The tokens' processes hold the same parameters each, or, where parameters are sharded, a part of them each (see
`shards`): of masters, moments and gradients. Checkpoints and results hold whole tensors, so a run may go on with
another number of processes, arranged otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trimtab.errors import InputError
from trimtab.sae._mesh import joined, part_of
from trimtab.sae.learner import Computed, Learner, SelfTest, StepLosses

_ALIKE = ("b_dec",)
"""Parameters that every process of the latents holds whole."""


class Parallel:
    """The processes of a run; one alone does nothing of this.

    Args:
        mesh: dimensions "tokens" and "latents"; None: one process.
        shard_parameters: whether each of the tokens' processes keeps a part of the parameters.
    """

    def __init__(self, mesh: DeviceMesh | None = None, *, shard_parameters: bool = False) -> None:
        self._mesh = mesh
        self.size: int = 1 if mesh is None else mesh.size()
        self.tokens: int = 1 if mesh is None else mesh["tokens"].size()
        self.latents: int = 1 if mesh is None else mesh["latents"].size()
        self.writes: bool = mesh is None or mesh.get_rank() == 0
        """Whether this process writes the files."""
        self.split: MeshSplit | None = None if mesh is None else MeshSplit(mesh)
        self.shared: DeviceMesh | None = mesh["tokens"] if mesh is not None and shard_parameters else None
        """Processes of which each keeps a part of the parameters."""
        if self.tokens == 1:
            self.shared = None

    @classmethod
    def current(
        cls, latents: int = 1, *, device: str | torch.device = "cpu", shard_parameters: bool = False
    ) -> Parallel:
        """Join the processes that torchrun has started, or be alone.

        Args:
            latents: processes that share the latents; the others share the tokens.
            device: gloo joins CPUs, NCCL joins CUDA devices.
            shard_parameters: whether each of the processes that share the tokens keeps a part of the parameters.

        Raises:
            InputError: the number of processes is no multiple of `latents`.
        """
        kind, number = torch.device(device).type, torch.device(device).index
        if kind == "cuda" and number is not None:
            torch.cuda.set_device(number)
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        size = dist.get_world_size() if dist.is_initialized() else 1
        if latents < 1 or size % latents:
            raise InputError(
                f"{latents} processes are to share the latents, and {size} are running; start a multiple of {latents} "
                "with torchrun --nproc-per-node"
            )
        if size == 1:
            return cls()
        mesh = init_device_mesh(kind, (size // latents, latents), mesh_dim_names=("tokens", "latents"))
        return cls(mesh, shard_parameters=shard_parameters)

    def step(self, learner: Learner, x: Tensor, target: Tensor | None) -> StepLosses:
        """Take one step of all processes.

        Args:
            learner: this process's part.
            x: the whole batch, the same in every process.
            target: likewise.
        """
        if self._mesh is None:
            return learner.step(x, target)
        rows = self._rows(len(x))
        computed = learner.compute(x[rows], None if target is None else target[rows])
        return learner.apply(self._reduced(learner, computed))

    def any(self, flag: bool) -> bool:
        """Whether any process says so; every one hears the same."""
        if self._mesh is None:
            return flag
        told = torch.tensor(float(flag), device=self._mesh.device_type)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)

    def wait(self) -> None:
        """Wait for all processes."""
        if self._mesh is not None:
            dist.barrier()

    @contextmanager
    def alone(self, lock: AbstractContextManager[Any]) -> Iterator[None]:
        """Hold a lock in the process that writes."""
        if self.writes:
            with lock:
                self.wait()
                yield
        else:
            self.wait()
            yield

    def parameters(self, learner: Learner) -> dict[str, Tensor]:
        """Return the whole parameters, as `Learner.parameters_unscaled`."""
        return self._whole(learner.parameters_unscaled())

    def gradients(self, learner: Learner, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Return the whole gradients of a batch that every process sees, as `Learner.gradients`."""
        return self._whole(learner.gradients(x, target))

    def self_test(self, learner: Learner, x: Tensor, target: Tensor | None) -> SelfTest:
        """Judge the whole gradients of a batch that every process sees, as `Learner.self_test`."""
        reached = self.any(learner.sparsity_reaches(x, target))
        return SelfTest.of(self.gradients(learner, x, target), reached=reached)

    def gather(self, local: Tensor, dim: int = 0) -> Tensor:
        """Join what the processes of the latents hold of a tensor."""
        return local if self._mesh is None or self.latents == 1 else joined(local, self._mesh["latents"], dim)

    def state(self, learner: Learner) -> dict[str, Tensor]:
        """Return the whole state of a learner, in the process that writes; the others keep nothing of it."""
        found = {}
        for name, one in learner.state().items():
            whole = self._join(name, one)
            if self.writes:
                found[name] = whole
        return found

    def load_state(self, learner: Learner, whole: Mapping[str, Tensor]) -> None:
        """Take this process's part of a whole state."""
        own = dict(whole)
        for name, one in whole.items():
            if self._mesh is not None and _is_split(name):
                own[name] = part_of(one, self._mesh["latents"])
            if self.shared is not None and _is_shared(name):
                own[name] = part_of(own[name], self.shared)
        learner.load_state(own)

    def _rows(self, batch: int) -> slice:
        """Return the tokens of a batch that this process sees."""
        assert self._mesh is not None
        if batch % self.tokens:
            raise InputError(f"a batch of {batch} tokens cannot be shared by {self.tokens} processes alike")
        part = batch // self.tokens
        return slice(self._mesh["tokens"].get_local_rank() * part, (self._mesh["tokens"].get_local_rank() + 1) * part)

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._join(f"parameter.{name}", one, dim=int(name == "W_enc")) for name, one in tensors.items()}

    def _join(self, name: str, local: Tensor, dim: int = 0) -> Tensor:
        """Return the whole of a tensor of a learner's state."""
        if self.shared is not None and _is_shared(name):
            local = joined(local, self.shared, dim)
        return self.gather(local, dim) if _is_split(name) else local

    def _reduced(self, learner: Learner, computed: Computed) -> Computed:
        """Return what one process would have computed, this process's latents of it."""
        assert self._mesh is not None
        tokens, latents = self._mesh["tokens"].get_group(), self._mesh["latents"].get_group()
        gradients = {}
        for name, one in computed.gradients.items():
            wide = one.to(learner.precision.wide)
            if self.tokens > 1 and self.shared is None:
                dist.all_reduce(wide, group=tokens)
                wide /= self.tokens
            gradients[name] = wide
        fired, cut = computed.fired.clone(), computed.cut
        dist.all_reduce(fired, group=tokens)
        if cut is not None:
            cut = cut.clone()
            dist.all_reduce(cut, op=dist.ReduceOp.MIN)
        names = list(computed.losses)
        figures = torch.tensor([computed.losses[name] for name in names], dtype=torch.float64, device=fired.device)
        dist.all_reduce(figures, group=tokens)
        losses = dict(zip(names, (figures / self.tokens).tolist(), strict=True))
        total = computed.tokens * self.tokens
        count = fired.sum().double()
        dist.all_reduce(count, group=latents)
        losses["l0"] = float(count) / total
        return Computed(
            losses=losses,
            gradients=gradients,
            fired=fired,
            tokens=total,
            coefficient=computed.coefficient,
            cut=cut,
            norm=self._norm(learner, gradients),
        )

    def _norm(self, learner: Learner, gradients: Mapping[str, Tensor]) -> float:
        """Return the length of the whole unscaled gradient."""
        assert self._mesh is not None
        squares = torch.zeros(2, dtype=torch.float64, device=self._mesh.device_type)  # of latents, of all latents alike
        for name, one in gradients.items():
            scale = learner.scales.of(name) / learner.scales.loss
            squares[int(name in _ALIKE)] += (one.double().norm() * scale).square()
        if self.shared is not None:
            dist.all_reduce(squares, group=self.shared.get_group())
        own, alike = squares
        dist.all_reduce(own, group=self._mesh["latents"].get_group())
        return float((own + alike).sqrt())


def own_device(device: str | torch.device) -> str:
    """Return the device of this process: of those that torchrun starts on a machine each has a CUDA device alone."""
    if str(device) == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return str(device)


class MeshSplit:
    """How latents, and tokens, are spread over a mesh; see `architectures.Split`."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._latents, self._tokens = mesh["latents"], mesh["tokens"]
        self.batches: int = self._tokens.size()

    def own(self, d_sae: int) -> slice:
        """Return the range of latents that this process holds: as DTensor shards a dimension."""
        part = -(-d_sae // self._latents.size())
        start = min(self._latents.get_local_rank() * part, d_sae)
        return slice(start, min(start + part, d_sae))

    def reduce(self, partial: Tensor) -> Tensor:
        """Return the sum over the latents' processes; its gradient passes unchanged."""
        result: Tensor = _Reduce.apply(partial, self._latents.get_group())  # type: ignore[no-untyped-call]
        return result

    def share(self, whole: Tensor) -> Tensor:
        """Return what every process of the latents holds alike; its gradient is summed over them."""
        result: Tensor = _Share.apply(whole, self._latents.get_group())  # type: ignore[no-untyped-call]
        return result

    def batch_sum(self, partial: Tensor) -> Tensor:
        """Return the sum over the tokens' processes; it has no gradient."""
        found = partial.detach().clone()
        dist.all_reduce(found, group=self._tokens.get_group())
        return found

    def kth_largest(self, largest: Tensor, k: int, *, batch: bool) -> Tensor:
        """Return the k-th largest over processes [rows, 1], of the whole batch or of every row."""
        found = _gathered(largest, self._latents.get_group())
        if batch:
            found = _gathered(found, self._tokens.get_group())
        return found.topk(min(k, found.shape[1]), dim=1).values[:, -1:]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:
        found = partial.detach().clone()
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        found = grads[0].clone()
        dist.all_reduce(found, group=ctx.group)
        return found, None


def _gathered(values: Tensor, group: Any) -> Tensor:
    """Join the columns of all processes; those that have fewer are filled up below every value."""
    size = dist.get_world_size(group)
    if size == 1:
        return values
    width = torch.tensor(values.shape[1], device=values.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX, group=group)
    filled = values.new_full((values.shape[0], int(width)), -torch.inf)
    filled[:, : values.shape[1]] = values
    parts = [torch.empty_like(filled) for _ in range(size)]
    dist.all_gather(parts, filled, group=group)
    return torch.cat(parts, dim=1)


def _is_shared(name: str) -> bool:
    """Whether the tokens' processes may share a tensor of a learner's state."""
    return name.partition(".")[0] in ("parameter", "first", "second")


def _is_split(name: str) -> bool:
    """Whether the latents' processes share a tensor of a learner's state."""
    return name == "silent" or (_is_shared(name) and name.partition(".")[2] not in _ALIKE)
