"""After an update of Adam: what rounding alone sets apart passes, and every other difference does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab import dump
from trimtab.compare import Comparison, compare
from trimtab.compare._updates import BEHIND, MOVED, Settings

STEPS, WIDTH, HEADS = 3, 16, 4
Fault = Callable[[int, nn.Module], None]


class Attention(nn.Module):
    """Self-attention; the gradient of the key's bias is 0 in exact arithmetic, because softmax does not see it."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.qkv, self.out, self.order = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), order

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        factor = (WIDTH // HEADS) ** -0.5 * 1.1  # no power of 2, so that it matters where it stands
        scores = (q * factor) @ k.mT if self.order else (q @ k.mT) * factor
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class Model(nn.Module):
    def __init__(self, order: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(order) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def train(
    out: Path, order: int, *, kind: str = "AdamW", fault: Fault | None = None, zero: bool = False, **settings: Any
) -> Path:
    """Train a seeded model; `order` says where the factor of the scores is multiplied in."""
    torch.manual_seed(0)
    model = Model(order)
    if zero:
        for block in model.blocks:
            nn.init.zeros_(block.qkv.bias)
    optimizer = getattr(torch.optim, kind)(model.parameters(), **{"lr": 1e-3, **settings})
    data = torch.randn(STEPS, 2, 8, 12, WIDTH, generator=torch.Generator().manual_seed(1))
    with dump.record(out) as session:
        session.watch(model, optimizer)
        for step, (x, y) in enumerate(data):
            (model(x) - y).square().mean().backward()
            if fault is not None:
                fault(step, model)
            optimizer.step()
            optimizer.zero_grad()
            session.step()
    return out


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("updates") / "reference", 0)


def failing(result: Comparison) -> list[str]:
    return [f"{one.key.kind} {one.key.tensor} {one.key.step}" for one in result.failing()]


@pytest.mark.parametrize("zero", [False, True])
def test_another_order_of_products_passes_all_steps(tmp_path: Path, zero: bool) -> None:
    traces = [train(tmp_path / str(order), order, zero=zero) for order in (0, 1)]
    result = compare(*traces)
    assert result.passed, failing(result)[:5]
    said = {record.key.name for record in result.records if MOVED in record.warnings}
    assert {"blocks.0.qkv.bias", "blocks.1.qkv.bias"} <= said
    assert any(MOVED in text for text in result.warnings)


def test_without_the_settings_of_the_optimizer_it_does_not(reference: Path, tmp_path: Path) -> None:
    candidate = train(tmp_path / "b", 1)
    path = reference / "manifest.json"
    kept = path.read_text()
    manifest = json.loads(kept)
    manifest["plan"]["optimizer"] = {}
    try:
        path.write_text(json.dumps(manifest))
        result = compare(reference, candidate)
    finally:
        path.write_text(kept)
    assert not result.passed
    found = failing(result)
    assert found[0] == "param blocks.0.qkv.bias 1" and not any(one.endswith(" 0") for one in found)


def scale_late(step: int, model: nn.Module) -> None:
    if step == 1:
        model.blocks[1].out.weight.grad *= 1.01


def replace_cancelled(step: int, model: nn.Module) -> None:
    """The part of the gradient that is rounding becomes what is none, still small beside the rest."""
    if step == 1:
        model.blocks[0].qkv.bias.grad[WIDTH : 2 * WIDTH] = 1e-4


def shift_parameter(step: int, model: nn.Module) -> None:
    if step == 1:
        with torch.no_grad():
            model.blocks[0].out.weight *= 1 + 1e-4


def throw_cancelled(step: int, model: nn.Module) -> None:
    """Ten times as far as the update can have carried an element whose gradient is rounding."""
    if step == 1:
        with torch.no_grad():
            model.blocks[0].qkv.bias[WIDTH : 2 * WIDTH] += 1e-4


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"weight_decay": 0.02}, "param blocks.0.qkv.weight 1"),
        ({"eps": 1e-4}, "param blocks.0.qkv.weight 1"),
        ({"lr": 1.001e-3}, "value lr.0 0"),
        ({"betas": (0.9, 0.998)}, "optim blocks.0.qkv.weight.exp_avg_sq 0"),
        ({"fault": scale_late}, "grad blocks.1.out.weight 1"),
        ({"fault": replace_cancelled}, "grad blocks.0.qkv.bias 1"),
        ({"fault": shift_parameter}, "param blocks.0.out.weight 2"),
        ({"fault": throw_cancelled}, "param blocks.0.qkv.bias 2"),
    ],
    ids=["decay", "eps", "rate", "betas", "late", "cancelled", "parameter", "thrown"],
)
def test_a_mistake_in_or_after_an_update_is_found(
    reference: Path, tmp_path: Path, options: Mapping[str, Any], first: str
) -> None:
    result = compare(reference, train(tmp_path / "b", 1, **options))
    assert not result.passed
    assert failing(result)[0] == first


@pytest.mark.parametrize(
    ("fault", "parameter"), [(scale_late, "blocks.1.out.weight"), (replace_cancelled, "blocks.0.qkv.bias")]
)
def test_an_update_with_moments_that_differ_excuses_nothing(
    reference: Path, tmp_path: Path, fault: Fault, parameter: str
) -> None:
    result = compare(reference, train(tmp_path / "b", 1, fault=fault))
    assert f"param {parameter} 2" in failing(result)
    assert not any(BEHIND in record.warnings for record in result.records if record.key.step >= 2)


def test_nothing_is_excused_where_the_gradients_enter_linearly(tmp_path: Path) -> None:
    result = compare(*(train(tmp_path / str(order), order, kind="SGD", lr=0.1) for order in (0, 1)))
    assert result.passed, failing(result)[:5]
    assert not any(MOVED in text or BEHIND in text for text in result.warnings)


def test_parameters_far_apart_leave_what_follows_undecided(tmp_path: Path) -> None:
    result = compare(*(train(tmp_path / str(order), order, lr=0.3) for order in (0, 1)))
    assert not result.passed
    assert not any(one.endswith(" 0") for one in failing(result))
    undecided = [one for one in result.failing() if one.status == "inconclusive" and "noise run" in one.reasons[0]]
    assert undecided and all("of their norm apart" in one.reasons[0] for one in undecided)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_the_update_is_that_of_torch(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    parameter = nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    optimizer = getattr(torch.optim, kind)([parameter], lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0)
    for count in (1, 2, 3):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(50, generator=generator, dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[parameter]
        step = Settings(0.8, 0.95, 1e-3).update(state["exp_avg"], state["exp_avg_sq"], count)
        assert torch.allclose(before - parameter.detach(), 0.01 * step, rtol=1e-12, atol=0)
