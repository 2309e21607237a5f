"""Optimizers against torch's own and each other, schedules, the decoder's constraint, and the control of L0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.sae.learners import EXACT, batches, learner
from trimtab.errors import RecipeError
from trimtab.sae import Learner, OptimConfig, Precision, SAEConfig, Scales, SparseDictionary
from trimtab.sae.optim import SparsityControl, Updater, lr_factor, sparsity_factor

WIDE = torch.float64
ROWS, WIDTH = 6, 5


def spread_gradients(steps: int, dtype: torch.dtype = WIDE) -> list[Tensor]:
    """Gradients of every size from 1e-8 to 1, one size per element."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-8, 0, ROWS * WIDTH, dtype=WIDE).reshape(ROWS, WIDTH)
    return [(torch.randn(ROWS, WIDTH, generator=generator, dtype=WIDE) * sizes).to(dtype) for _ in range(steps)]


def updated(gradients: list[Tensor], *, name: str = "W_enc", plain: bool = False, **settings: Any) -> Tensor:
    """Where a parameter of zeros ends."""
    dtype = gradients[0].dtype
    parameters = {name: torch.zeros(ROWS, WIDTH, dtype=dtype)}
    precision = EXACT if dtype == WIDE else Precision()
    made = Updater(OptimConfig(**settings), parameters, Scales.unit(), precision, decoder_norm=1.0)
    for gradient in gradients:
        if plain:
            made.steps += 1
            made._plain(name, gradient, parameters[name], 1.0, 0.0, made._rates(name, 1e-3))
        else:
            made.step({name: gradient}, {}, lr=1e-3, norm=made.norm({name: gradient}))
    return parameters[name]


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adam_is_torchs_adam(beta1: float) -> None:
    gradients = spread_gradients(300)
    reference = torch.zeros(ROWS, WIDTH, dtype=WIDE, requires_grad=True)
    other = torch.optim.Adam([reference], lr=1e-3, betas=(beta1, 0.999), eps=1e-8)
    for gradient in gradients:
        reference.grad = gradient.clone()
        other.step()
    for plain in (False, True):
        mine = updated(gradients, beta1=beta1, plain=plain)
        assert torch.allclose(mine, reference.detach(), rtol=1e-11, atol=1e-14)


def test_rmsprop_is_adam_without_a_first_moment_where_gradients_are_near_eps_too() -> None:
    gradients = spread_gradients(2000, torch.float32)
    adam, rmsprop = (updated(gradients, optimizer=kind) for kind in ("adam", "rmsprop"))
    assert float((adam - rmsprop).abs().max()) < 1e-6  # 1.9e-3 with the rate mapped and eps not
    assert adam.abs().min() > 1e-5, "some element did not move, so nothing was shown of it"


def test_rmsprop_without_its_eps_map_is_another_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Updater._rates

    def lacking(self: Updater, name: str, lr: float) -> tuple[float, float, float]:
        rate, root, _ = whole(self, name, lr)
        return rate, root, 1e-8

    gradients = spread_gradients(2000, torch.float32)
    adam = updated(gradients, optimizer="adam")
    monkeypatch.setattr(Updater, "_rates", lacking)
    assert float((adam - updated(gradients, optimizer="rmsprop")).abs().max()) > 1e-4


def test_the_decoder_keeps_its_length_and_loses_the_gradient_along_it() -> None:
    rows = torch.randn(ROWS, WIDTH, dtype=WIDE)
    rows = 3 * rows / rows.norm(dim=1, keepdim=True)
    settings = OptimConfig(eps=1e-30)
    for plain in (False, True):
        parameters = {"W_dec": rows.clone()}
        made = Updater(settings, parameters, Scales(b_d=2.0), EXACT, decoder_norm=1.5)
        gradient = torch.randn(ROWS, WIDTH, dtype=WIDE, generator=torch.Generator().manual_seed(4))
        if plain:
            made.steps = 1
            made._plain("W_dec", gradient, parameters["W_dec"], 1.0, 3.0, made._rates("W_dec", 1e-3))
        else:
            made.step({"W_dec": gradient}, {}, lr=1e-3, norm=1.0)
        across = gradient - (gradient * rows).sum(1, keepdim=True) * rows / 9
        moved = rows - 2e-3 * across.sign()  # the first step of Adam: its rate, by sign
        assert torch.allclose(parameters["W_dec"], 3 * moved / moved.norm(dim=1, keepdim=True), atol=1e-12)
    free = {"W_dec": rows.clone()}
    Updater(OptimConfig(decoder_norm="free"), free, Scales(), EXACT, decoder_norm=3.0).step(
        {"W_dec": rows}, {}, lr=1e-3, norm=1.0
    )
    assert not torch.allclose(free["W_dec"].norm(dim=1), torch.tensor(3.0, dtype=WIDE), atol=1e-4)


def test_clipping_scales_the_unscaled_gradient() -> None:
    parameters = {"b_enc": torch.zeros(4, dtype=WIDE)}
    chosen = Scales(s=2.0, b_e=3.0, g=5.0)
    made = Updater(OptimConfig(clip=0.5, eps=1.0), parameters, chosen, EXACT, decoder_norm=1.0)
    unscaled = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=WIDE)
    gradient = unscaled * (chosen.loss / chosen.of("b_enc"))
    norm = made.norm({"b_enc": gradient})
    assert norm == pytest.approx(5.0)
    made.step({"b_enc": gradient}, {}, lr=1.0, norm=norm)
    clipped = unscaled / 10
    assert torch.allclose(parameters["b_enc"] / chosen.of("b_enc"), -clipped / (clipped.abs() + 1.0), atol=1e-12)


def test_low_precision_copies_move_with_their_masters() -> None:
    made = learner("jumprelu", precision=Precision.parse("fp32", "bf16"))
    for x in batches(3):
        made.step(x)
    for name in ("W_enc", "W_dec"):
        assert made._low[name].dtype == torch.bfloat16
        assert made._low[name].equal(made.parameters_stored()[name].bfloat16())


def test_the_threshold_stays_positive_and_wide_and_moves_by_its_rate() -> None:
    """200 steps of Adam with gradients of one sign move it by 200 rates; at 0 it stops."""
    for precision in map(Precision.parse, ("fp32", "fp32", "bf16", "fp16"), (None, "bf16", None, None)):
        settings = SAEConfig(d_in=16, d_sae=48, threshold=0.05, bandwidth=0.1)
        made = Learner(settings, optim=OptimConfig(lr=1e-4, warmup=0, decay=0), precision=precision, total_steps=200)
        stored = {name: value for name, value in made.parameters_stored().items() if name == "threshold"}
        assert stored["threshold"].dtype == torch.float32
        updater = Updater(made.optim, stored, made.scales, precision, decoder_norm=1.0)
        for _ in range(200):
            gradient = {"threshold": torch.full((48,), -0.3 * made.scales.loss)}
            updater.step(gradient, {}, lr=1e-4, norm=1.0)
        assert torch.allclose(made.parameters_unscaled()["threshold"], torch.tensor(0.07), rtol=1e-3)
        updater.step({"threshold": -gradient["threshold"]}, {}, lr=1.0, norm=1.0)
        assert made.parameters_unscaled()["threshold"].min() > 0


def test_thresholds_move_in_training_too() -> None:
    """The source's gradient was a thousand times too small, and SAELens's log-threshold moves by threshold x rate."""
    made = learner("jumprelu", optim={"lr": 1e-3, "warmup": 0}, total_steps=200)
    for x in batches(60):
        made.step(x)
    moved = (made.parameters_unscaled()["threshold"] - 0.05).abs()
    assert float(moved.median()) > 5e-3


def test_schedules() -> None:
    optim = OptimConfig(warmup=10, decay=0.2, sparsity_warmup=5)
    factors = [lr_factor(optim, step, 200) for step in range(201)]
    assert factors[0] == 0.1 and factors[5] == pytest.approx(0.55) and set(factors[10:161]) == {1.0}
    assert factors[180] == 0.5 and factors[200] == 0.0
    assert lr_factor(OptimConfig(warmup=1000), 99, 1000) < 1.0 == lr_factor(OptimConfig(warmup=1000), 100, 1000)
    assert [sparsity_factor(optim, step) for step in (0, 1, 4, 400)] == [0.2, 0.4, 1.0, 1.0]
    assert sparsity_factor(OptimConfig(), 0) == 1.0 and lr_factor(OptimConfig(decay=0.0), 999, 1000) == 1.0


@pytest.mark.parametrize("signed", [False, True])
def test_the_control_raises_and_lowers(signed: bool) -> None:
    control = SparsityControl(10.0, signed=signed)
    assert control.factor == 1.0
    control.observe(20.0)
    assert control.factor == pytest.approx(2.0 * math.exp(0.03 * math.log(2)))
    control.observe(9.9)
    assert control.factor == pytest.approx(math.exp(control.integral) * (1 + 40 * math.log(0.99)))
    for _ in range(40):
        control.observe(5.0)
    assert control.factor == (-math.exp(control.integral) if signed else 0.0) and control.integral < 0
    before = control.factor
    control.observe(math.nan)
    assert control.factor == before


@pytest.mark.parametrize(
    ("architecture", "target", "first"), [("jumprelu", 8.0, 1e-3), ("jumprelu", 25.0, 3e-2), ("standard", 8.0, 1e-3)]
)
def test_a_target_l0_is_reached(architecture: str, target: float, first: float) -> None:
    dictionary = SparseDictionary()
    jumps = {"bandwidth": 0.1, "threshold": 0.05} if architecture == "jumprelu" else {}
    made = Learner(
        SAEConfig(d_in=64, d_sae=256, architecture=architecture, sparsity_coefficient=first, **jumps),
        optim=OptimConfig(lr=3e-3, target_l0=target, warmup=20),
        total_steps=400,
    )
    for number in range(400):
        made.step(dictionary.sample(256, index=number))
    reached = sum(made.losses(dictionary.sample(512, index=500 + n)).l0 for n in range(8)) / 8
    assert reached == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; one of adam, rmsprop"),
        ({"optimizer": "rmsprop", "beta1": 0.9}, "rmsprop has no first moment"),
        ({"lr": 0.0}, "lr is 0.0; a finite number above 0"),
        ({"beta2": 1.0}, "beta2 is 1.0; a finite number at least 0 and below 1"),
        ({"decay": 1.5}, "a share of the run, 0 to 1"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"warmup": 0.5}, "warmup is 0.5; a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        OptimConfig(**settings)


def test_targets_that_cannot_be_reached_are_refused() -> None:
    with pytest.raises(RecipeError, match="target_l0 is 49; at most d_sae = 48 latents"):
        learner("jumprelu", optim={"target_l0": 49.0})
    with pytest.raises(RecipeError, match="target_l0 is 5; topk has k = 5 active latents"):
        learner("topk", optim={"target_l0": 5.0})
