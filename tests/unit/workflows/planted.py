"""A small transformer into which mistakes are planted, and a recorder of its forward and backward pass.

Every module is recorded with its inputs, outputs and gradients by plain torch hooks, so that what the triage sees does
not depend on the dumper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import trimtab.dump
from trimtab.trace import TraceWriter

WIDTH, HEADS, HIDDEN, VOCABULARY, LAYERS = 32, 4, 64, 61, 4
BATCH, LENGTH = 2, 12


class Linear(nn.Linear):
    """Sums the reduction dimension in two parts when `parts` is 2, as another kernel would."""

    parts = 1

    def forward(self, x: Tensor) -> Tensor:
        if self.parts == 1:
            return super().forward(x)
        half = self.in_features // 2
        return functional.linear(x[..., half:], self.weight[:, half:], self.bias) + functional.linear(
            x[..., :half], self.weight[:, :half]
        )


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = 1e-6
        self.weight_first = False

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_first:
            x = x * self.weight
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(width, width) for _ in range(4))
        self.scale, self.base, self.edge = (width // HEADS) ** -0.5, 10_000.0, 0
        self.order: list[int] | None = None
        self.merged_wrong = False

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2])[:, None] * self.base ** (-torch.arange(half) / half)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = self.rotate(q) @ self.rotate(k).transpose(-1, -2) * self.scale
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1 + self.edge).bool()
        heads = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        if self.order is not None:
            heads = heads[:, self.order]
        merged = heads.reshape(x.shape) if self.merged_wrong else heads.transpose(1, 2).reshape(x.shape)
        return self.o_proj(merged)


class Activation(nn.Module):
    kind = "gelu"

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "tanh":
            return functional.gelu(x, approximate="tanh")
        return {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}[self.kind](x)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = Linear(width, HIDDEN), Activation(), Linear(HIDDEN, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = Norm(width), Attention(width), Norm(width), Mlp(width)
        self.keep = [True, True]
        self.gradient = [1.0, 1.0]

    def forward(self, x: Tensor) -> Tensor:
        for index, (norm, branch) in enumerate(((self.norm1, self.attn), (self.norm2, self.mlp))):
            added = branch(norm(x))
            if self.gradient[index] != 1:
                added = ScaledGradient.apply(added, self.gradient[index])
            x = x + added if self.keep[index] else added
        return x


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(WIDTH) for _ in range(LAYERS))
        self.final_norm, self.head = Norm(WIDTH), Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.head(self.final_norm(x))


def make_model(seed: int) -> Transformer:
    """A model of one seed, whose biases are as large as what they are added to."""
    torch.manual_seed(seed)
    model = Transformer()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias, std=0.3)
    return model


def record(
    path: Path,
    model: nn.Module,
    ids: list[Tensor],
    *,
    steps: int = 1,
    before_step: Callable[[nn.Module, int], None] | None = None,
    plan: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Train for some steps, one micro-batch per entry of `ids`, and write everything to a trace."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TraceWriter(path, plan=plan, provenance=provenance or {}) as writer, ExitStack() as stack:
        now: dict[str, Any] = {"phase": "fwd_bwd"}
        for name, module in model.named_modules():
            if name:
                stack.callback(_record_module(writer, now, name, module))
        for step in range(steps):
            if before_step is not None:
                before_step(model, step)
            for name, parameter in model.named_parameters():
                writer.write(name, parameter.detach(), kind="param", phase="fwd_bwd", step=step)
            optimizer.zero_grad()
            for micro, batch in enumerate(ids):
                now.update(step=step, micro_step=micro)
                writer.write("input_ids", batch, **now)
                logits = model(batch).float()
                loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
                writer.write("loss", loss.detach(), **now)
                loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    writer.write(name, parameter.grad, kind="grad", phase="fwd_bwd", step=step)
            optimizer.step()
    return path


def _record_module(writer: TraceWriter, now: dict[str, Any], path: str, module: nn.Module) -> Callable[[], None]:
    parts = path.split(".")
    layer = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None

    def write(side: str, tensor: Tensor, tags: dict[str, Any]) -> None:
        writer.write(
            f"module:{path}.{side}", tensor.detach(), site=f"module:{path}.{side}", layer=layer, module_path=path,
            module_class=type(module).__name__, kind="grad" if side.startswith("grad") else "value", **tags,
        )  # fmt: skip

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, tags = args[0], dict(now)
        write("input", x, tags)
        if not x.requires_grad:
            return None
        x = x.view_as(x)  # its gradient is this module's alone
        x.register_hook(lambda gradient: write("grad_input", gradient, tags))
        return (x, *args[1:])

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        tags = dict(now)
        write("output", output, tags)
        if output.requires_grad:
            output.register_hook(lambda gradient: write("grad_output", gradient, tags))

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return lambda: [handle.remove() for handle in handles] and None


def dump(
    path: Path,
    model: nn.Module,
    ids: list[Tensor],
    *,
    steps: int = 1,
    before_step: Callable[[nn.Module, int], None] | None = None,
) -> Path:
    """The same training recorded by the dumper, one step per batch of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sites = [f"module:*.{side}" for side in ("input", "output", "grad_output", "grad_input")]
    parts = [part for part in trimtab.dump.PARTS if part not in ("optimizer", "rng")]
    with trimtab.dump.record(path, phase="fwd_bwd", sites=sites, parts=parts) as session:
        session.watch(model, optimizer)
        for step in range(steps):
            if before_step is not None:
                before_step(model, step)
            for batch in ids:
                trimtab.dump.dump("input_ids", batch)
                logits = model(batch).float()
                functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.step()
    return path
