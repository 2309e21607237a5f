"""Mistakes of at least twenty kinds, planted where and how a seed says: triage names the module and the kind.

A draw chooses the kind, the place, its size, who records (plain hooks or the dumper), and what else differs between the
two runs: nothing, the order of summation, or the dtype. `pytest -s` prints the table; the full form draws 500.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.unit.workflows import planted
from tests.unit.workflows.planted import HEADS, LAYERS, Activation, Linear, Norm, Transformer
from trimtab.workflows.triage import triage

Change = Callable[[Tensor], Tensor]
ANY = ("same", "order", "bfloat16")
FINE = ("same", "order")
"""Backgrounds: the two runs are equal but for the mistake; linear maps add in another order; the candidate runs in
bfloat16 against a float32 reference, beside which small mistakes cannot be seen."""


@dataclass
class Plant:
    """One mistake in a candidate model."""

    module: str
    fingerprints: tuple[str, ...]
    before_step: Callable[[nn.Module, int], None] | None = None
    steps: int = 1
    tags: dict[str, str] = field(default_factory=dict)


Planter = Callable[[Transformer, random.Random], Plant]
KINDS: dict[str, tuple[Planter, tuple[str, ...]]] = {}


def kind(backgrounds: tuple[str, ...] = ANY) -> Callable[[Planter], Planter]:
    def add(plant: Planter) -> Planter:
        KINDS[plant.__name__] = (plant, backgrounds)
        return plant

    return add


def modules_of(model: nn.Module, *classes: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, classes)]


def on_output(model: Transformer, draw: random.Random, change: Change, *classes: type[nn.Module]) -> str:
    """Change what one module returns."""
    path = draw.choice(modules_of(model, *(classes or (Linear, Norm, Activation, nn.Embedding))))
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda x: change(forward(x))
    return path


def on_block(draw: random.Random) -> tuple[int, int]:
    return draw.randrange(LAYERS), draw.randrange(2)


@kind()
def scale(model: Transformer, draw: random.Random) -> Plant:
    factor = draw.choice((0.7, 0.88, 1.13, 1.4))
    return Plant(on_output(model, draw, lambda x: x * factor), ("scale",))


@kind(FINE)
def small_scale(model: Transformer, draw: random.Random) -> Plant:
    factor = 1 + draw.choice((-1, 1)) * 10 ** draw.uniform(-3.5, -2)
    return Plant(on_output(model, draw, lambda x: x * factor), ("scale",))


@kind()
def sign(model: Transformer, draw: random.Random) -> Plant:
    return Plant(on_output(model, draw, torch.neg), ("sign",))


@kind()
def double_reduction(model: Transformer, draw: random.Random) -> Plant:
    ranks = draw.choice((2, 4, 8))
    return Plant(on_output(model, draw, lambda x: x * ranks, Linear), ("double_reduction",))


@kind()
def missing_reduction(model: Transformer, draw: random.Random) -> Plant:
    ranks = draw.choice((2, 4, 8))
    return Plant(on_output(model, draw, lambda x: x / ranks, Linear), ("missing_reduction",))


@kind()
def transpose(model: Transformer, draw: random.Random) -> Plant:
    layer = draw.randrange(LAYERS)
    model.layers[layer].attn.merged_wrong = True
    return Plant(f"layers.{layer}.attn", ("transpose", "permutation"))


@kind()
def swapped_heads(model: Transformer, draw: random.Random) -> Plant:
    layer = draw.randrange(LAYERS)
    order = list(range(HEADS))
    first, second = draw.sample(order, 2)
    order[first], order[second] = second, first
    model.layers[layer].attn.order = order
    return Plant(f"layers.{layer}.attn", ("permutation",))


@kind()
def permuted_channels(model: Transformer, draw: random.Random) -> Plant:
    path = draw.choice(modules_of(model, Linear))
    module = model.get_submodule(path)
    order = torch.randperm(module.out_features)
    forward = module.forward
    module.forward = lambda x: forward(x)[..., order]
    return Plant(path, ("permutation",))


@kind()
def shift_by_one(model: Transformer, draw: random.Random) -> Plant:
    by = draw.choice((1, -1))
    return Plant(on_output(model, draw, lambda x: x.roll(by, dims=1)), ("shift",))


@kind()
def zero_row(model: Transformer, draw: random.Random) -> Plant:
    def change(x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[:2], dtype=torch.bool)
        keep[row] = False
        return x * keep[..., None].to(x.dtype)

    row = (draw.randrange(planted.BATCH), draw.randrange(planted.LENGTH))
    return Plant(on_output(model, draw, change), ("zero_rows",))


@kind()
def nan_row(model: Transformer, draw: random.Random) -> Plant:
    def change(x: Tensor) -> Tensor:
        bad = torch.zeros(x.shape[:2], dtype=torch.bool)
        bad[row] = True
        return x.masked_fill(bad[..., None], float("nan"))

    row = (draw.randrange(planted.BATCH), draw.randrange(planted.LENGTH))
    return Plant(on_output(model, draw, change), ("nan_rows",))


@kind(FINE)
def missing_bias(model: Transformer, draw: random.Random) -> Plant:
    path = draw.choice(modules_of(model, Linear))
    module = model.get_submodule(path)
    forward = module.forward
    times = draw.choice((-1, 1))
    module.forward = lambda x: forward(x) + times * module.bias
    return Plant(path, ("missing_bias",))


@kind()
def bad_shard(model: Transformer, draw: random.Random) -> Plant:
    shards = draw.choice((2, 4))
    which = draw.randrange(shards)

    def change(x: Tensor) -> Tensor:
        width = x.shape[-1] // shards
        part = torch.zeros(x.shape[-1], dtype=torch.bool)
        part[which * width : (which + 1) * width] = True
        return torch.where(part, 1.7 * x.roll(3, dims=-1), x)

    names = [path for path in modules_of(model, Linear, Norm) if path != "head"]
    path = draw.choice(names)
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda x: change(forward(x))
    return Plant(path, ("bad_shard",))


@kind(FINE)
def wrong_eps(model: Transformer, draw: random.Random) -> Plant:
    path = draw.choice(modules_of(model, Norm))
    model.get_submodule(path).eps = 10 ** draw.uniform(-3, -1)
    return Plant(path, ("row_scale", "scale"))


@kind(FINE)
def norm_order(model: Transformer, draw: random.Random) -> Plant:
    path = draw.choice(modules_of(model, Norm))
    model.get_submodule(path).weight_first = True
    return Plant(path, ("row_scale", "scale"))


@kind()
def missing_attention_scale(model: Transformer, draw: random.Random) -> Plant:
    layer = draw.randrange(LAYERS)
    model.layers[layer].attn.scale = 1.0
    return Plant(f"layers.{layer}.attn", ("attention",))


@kind(FINE)
def rotary_base(model: Transformer, draw: random.Random) -> Plant:
    layer = draw.randrange(LAYERS)
    model.layers[layer].attn.base = draw.choice((500.0, 100_000.0, 1_000_000.0))
    return Plant(f"layers.{layer}.attn", ("attention",))


@kind()
def mask_edge(model: Transformer, draw: random.Random) -> Plant:
    layer = draw.randrange(LAYERS)
    model.layers[layer].attn.edge = 1
    return Plant(f"layers.{layer}.attn", ("mask_edge",))


@kind()
def dropped_residual(model: Transformer, draw: random.Random) -> Plant:
    layer, branch = on_block(draw)
    model.layers[layer].keep[branch] = False
    return Plant(f"layers.{layer}", ("residual",))


@kind(FINE)
def wrong_activation(model: Transformer, draw: random.Random) -> Plant:
    path = draw.choice(modules_of(model, Activation))
    model.get_submodule(path).kind = draw.choice(("tanh", "tanh", "relu", "silu"))
    return Plant(path, ("activation",))


@kind(FINE)
def rounded_output(model: Transformer, draw: random.Random) -> Plant:
    dtype = draw.choice((torch.bfloat16, torch.float16))
    path = on_output(model, draw, lambda x: x.to(dtype).float(), Linear, Norm, Activation)
    return Plant(path, ("coarse_rounding",))


@kind(FINE)
def cast_order(model: Transformer, draw: random.Random) -> Plant:
    path = draw.choice(modules_of(model, Linear))
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda x: forward(x.bfloat16().float())
    return Plant(path, ("coarse_arithmetic",))


@kind(FINE)  # updates of bfloat16 parameters are lost, which is a difference of its own
def stale_weights(model: Transformer, draw: random.Random) -> Plant:
    path = draw.choice([one for one in modules_of(model, Linear) if "k_proj" not in one])
    name = f"{path}.weight"
    before = model.get_parameter(name).detach().clone()

    def again(model: nn.Module, step: int) -> None:
        if step:
            model.get_parameter(name).data.copy_(before)

    return Plant(path, ("stale_step",), before_step=again, steps=2)


@kind()
def half_gradient(model: Transformer, draw: random.Random) -> Plant:
    layer, branch = on_block(draw)
    model.layers[layer].gradient[branch] = 0.5
    return Plant(f"layers.{layer}", ("missing_reduction",))


@kind()
def no_gradient(model: Transformer, draw: random.Random) -> Plant:
    layer, branch = on_block(draw)
    model.layers[layer].gradient[branch] = 0.0
    return Plant(f"layers.{layer}", ("zero_rows",))


@kind()
def wrong_weight_gradient(model: Transformer, draw: random.Random) -> Plant:
    path = draw.choice(modules_of(model, Linear, Norm, nn.Embedding))
    factor, expected = draw.choice(((-1.0, "sign"), (1.37, "scale"), (2.0, "double_reduction")))
    model.get_submodule(path).weight.register_hook(lambda gradient: gradient * factor)
    return Plant(path, (expected,))


@kind()
def wrong_input_gradient(model: Transformer, draw: random.Random) -> Plant:
    path = draw.choice(modules_of(model, Linear, Norm))
    module = model.get_submodule(path)
    factor, expected = draw.choice(((-1.0, "sign"), (0.73, "scale"), (3.0, "double_reduction")))
    forward = module.forward
    module.forward = lambda x: forward(planted.ScaledGradient.apply(x, factor))
    return Plant(path, (expected,))


@dataclass
class Outcome:
    """One draw: what was planted and what was named."""

    seed: int
    kind: str
    background: str
    module: str
    named: str
    fingerprints: tuple[str, ...]
    right_module: bool
    right_kind: bool


def plant(seed: int, folder: Path) -> Outcome:
    draw = random.Random(seed)
    name = draw.choice(sorted(KINDS))
    planter, backgrounds = KINDS[name]
    background = draw.choice(backgrounds)
    weights = draw.randrange(8)
    reference, candidate = planted.make_model(weights), planted.make_model(weights)
    torch.manual_seed(seed)
    ids = [torch.randint(0, planted.VOCABULARY, (planted.BATCH, planted.LENGTH))]
    if background == "order":
        for module in candidate.modules():
            if isinstance(module, Linear):
                module.parts = 2
    if background == "bfloat16":
        candidate = candidate.bfloat16()
    mistake = planter(candidate, draw)
    recorder = draw.choice((planted.record, planted.dump))
    ours = recorder(folder / "reference", reference, ids, steps=mistake.steps)
    theirs = recorder(folder / "candidate", candidate, ids, steps=mistake.steps, before_step=mistake.before_step)
    found = triage(ours, theirs).divergence
    kinds = tuple(one.kind for one in found.fingerprints) if found is not None else ()
    named = found.module_path if found is not None else "(nothing)"
    return Outcome(
        seed, name, background, mistake.module, named, kinds,
        named == mistake.module, bool(kinds[:1]) and kinds[0] in mistake.fingerprints,
    )  # fmt: skip


def confusion(outcomes: list[Outcome]) -> str:
    """One line per kind: draws, right module, right kind, and what was said instead."""
    lines = [f"{'planted':26}{'draws':>6}{'module':>8}{'kind':>8}  first fingerprint"]
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for one in outcomes:
        groups[one.kind].append(one)
    for name, group in sorted(groups.items()):
        said = Counter(one.fingerprints[0] if one.fingerprints else "none" for one in group)
        right = (sum(one.right_module for one in group), sum(one.right_kind for one in group))
        kinds = ", ".join(f"{kind} {number}" for kind, number in said.most_common())
        lines.append(f"{name:26}{len(group):6}{right[0]:8}{right[1]:8}  {kinds}")
    total = (sum(one.right_module for one in outcomes), sum(one.right_kind for one in outcomes))
    lines.append(f"{'all':26}{len(outcomes):6}{total[0] / len(outcomes):8.1%}{total[1] / len(outcomes):8.1%}")
    lines += [
        f"  seed {one.seed} {one.kind}, {one.background}: planted in {one.module}, named {one.named} {one.fingerprints}"
        for one in outcomes
        if not (one.right_module and one.right_kind)
    ]
    return "\n".join(lines)


def draw_many(seeds: range, folder: Path) -> list[Outcome]:
    return [plant(seed, folder / str(seed)) for seed in seeds]


def check(outcomes: list[Outcome]) -> None:
    table = confusion(outcomes)
    sys.stdout.write(f"\n{table}\n")
    modules = sum(one.right_module for one in outcomes) / len(outcomes)
    kinds = sum(one.right_kind for one in outcomes) / len(outcomes)
    assert modules >= 0.95, table
    assert kinds >= 0.80, table


@pytest.fixture(autouse=True)
def without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changed in this repository is no part of a draw."""
    monkeypatch.setenv("GIT_DIR", "/nonexistent")


def test_at_least_twenty_kinds() -> None:
    assert len(KINDS) >= 20


def test_planted_mistakes_are_found(tmp_path: Path) -> None:
    check(draw_many(range(25), tmp_path))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_five_hundred_planted_mistakes_are_found(tmp_path: Path) -> None:
    check(draw_many(range(1000, 1500), tmp_path))
