"""A scaled run is the unscaled run: every architecture, every optimizer, any scales."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.unit.sae.learners import CONFIGS, D_IN, D_SAE, OPTIMIZERS, apart, batches, config, learner, scales
from trimtab.errors import RecipeError
from trimtab.sae import Learner, OptimConfig, Precision, SAEConfig, Scales
from trimtab.sae.optim.update import Updater

BOUND = 1e-12  # float64 rounding of 60 steps; 2e-15 was seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_scaled_run_is_the_unscaled_one(name: str, optimizer: str) -> None:
    chosen = scales(len(name) + 7 * len(optimizer), kappa_is_one=optimizer == "rmsprop")
    plain = learner(name, optim=OPTIMIZERS[optimizer])
    scaled = learner(name, optim=OPTIMIZERS[optimizer], scales=chosen)
    revived = 0.0
    for x in batches(60):
        one, other = plain.step(x), scaled.step(x)
        assert one.l0 == other.l0
        for figure in ("loss", "recon", "sparsity", "aux", "grad_norm", "coefficient"):
            assert math.isclose(getattr(one, figure), getattr(other, figure), rel_tol=BOUND, abs_tol=BOUND), figure
        revived = max(revived, one.aux)
    assert apart(plain, scaled) < BOUND
    assert revived > 0 or "topk" not in name, "no latent was dead, so nothing was shown of them"
    assert apart(plain, learner(name)) > 1e-3, "nothing was learned"


@pytest.mark.parametrize("name", ["jumprelu", "topk"])
def test_the_general_form_scales_too(name: str) -> None:
    plain, scaled = learner(name, general=True), learner(name, general=True, scales=scales(3))
    for x in batches(60):
        plain.step(x)
        scaled.step(x)
    assert apart(plain, scaled) < BOUND


@pytest.mark.parametrize("what", ["rate", "eps", "clip"])
def test_without_one_of_the_maps_the_runs_part(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "rate":
        monkeypatch.setattr(Scales, "map_lr", lambda self, name, lr: lr)
    elif what == "eps":
        monkeypatch.setattr(Scales, "map_eps", lambda self, name, eps: eps)
    else:
        monkeypatch.setattr(Updater, "norm", lambda self, g: float(sum((one**2).sum() for one in g.values())) ** 0.5)
    optim = {"clip": 0.05, "eps": 1e-3}
    plain, scaled = learner("jumprelu", optim=optim), learner("jumprelu", optim=optim, scales=scales(3))
    for x in batches(60):
        one, other = plain.step(x), scaled.step(x)
    assert apart(plain, scaled) > 1e-4
    assert what != "rate" or abs(one.recon - other.recon) > 1e-3


@pytest.mark.parametrize("precision", [Precision(), Precision.parse("fp32", "bf16")], ids=str)
@pytest.mark.parametrize("name", ["jumprelu", "jumprelu-sparse", "topk", "gated", "matryoshka-jumprelu"])
def test_powers_of_two_change_no_bit(name: str, precision: Precision) -> None:
    chosen = Scales(s=8.0, b_e=0.25, b_d=16.0, c=0.5, g=1024.0)
    plain = learner(name, precision=precision)
    scaled = learner(name, precision=precision, scales=chosen)
    for x in batches(20):
        assert plain.step(x).l0 == scaled.step(x).l0
    assert apart(plain, scaled) == 0


def test_the_first_loss_is_that_of_an_independent_forward() -> None:
    """The target has kappa, and every term its scale, as an unscaled forward written by hand says."""
    made = learner("jumprelu", scales=scales(11))
    made.parameters_stored()["b_dec"].copy_(torch.linspace(-0.1, 0.2, D_IN) * made.scales.of("b_dec"))
    x = batches(1)[0].double()
    p = made.parameters_unscaled()
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    mask = pre > p["threshold"]
    y = torch.where(mask, pre, 0) @ p["W_dec"] + p["b_dec"]
    seen = made.losses(x)
    assert seen.recon == pytest.approx(float((y - x).square().sum(1).mean()), rel=1e-12)
    assert seen.l0 == float(mask.sum(1).double().mean())
    assert seen.sparsity == pytest.approx(1e-3 * seen.l0)
    fvu = float((y - x).square().sum() / (x - x.mean(0)).square().sum())
    spread = float((x - x.mean(0)).square().sum(1).mean())
    assert seen.recon / spread == pytest.approx(fvu, rel=1e-12)
    assert torch.allclose(made.latents(x), torch.where(mask, pre, 0), atol=1e-13)
    assert torch.allclose(made.reconstruct(x), y, atol=1e-13)


@pytest.mark.parametrize("name", CONFIGS)
def test_learning_ends_with_x_itself_and_not_a_share_of_it(name: str) -> None:
    """Without kappa on the target a run learns x / kappa."""
    made = learner(name, scales=Scales(s=4.0, b_e=8.0, b_d=8.0, c=0.25), optim={"lr": 1e-2})
    for x in batches(60):
        made.step(x)
    y, x = made.reconstruct(batches(1)[0]), batches(1)[0].double()
    assert 0.5 < float((y * x).sum() / x.square().sum()) < 1.2


def test_algebra() -> None:
    chosen = Scales(s=2.0, b_e=3.0, b_d=5.0, c=7.0, g=11.0)
    assert (chosen.kappa, chosen.total, chosen.pre, chosen.loss) == (105.0, 210.0, 6.0, 11.0 * 210.0**2)
    names = ("W_enc", "W_dec", "b_dec", "b_enc", "threshold", "r_mag")
    assert [chosen.of(name) for name in names] == [3.0, 5.0, 2.0, 6.0, 6.0, 1.0]
    assert chosen.map_gradient("W_dec", 1.0) == chosen.map_eps("W_dec", 1.0) == chosen.loss / 5.0
    assert Scales.unit() == Scales() and Scales().loss == 1.0


def test_chosen_scales_are_powers_of_two_with_kappa_one_and_operands_near_one() -> None:
    made = SAEConfig(d_in=100, d_sae=3000)
    narrow = Precision.parse("fp32", "fp16")
    chosen = Scales.choose(made, {"batch_size": 512, "norm": 3.4}, narrow)
    for value in (chosen.s, chosen.b_e, chosen.b_d, chosen.c, chosen.g):
        assert math.log2(value).is_integer()
    assert chosen.kappa == 1.0 and chosen.norm == 3.4
    low = Learner(made, precision=narrow, scales=chosen).parameters_stored()
    for name in ("W_enc", "W_dec"):
        assert 0.7 < float(low[name].square().mean().sqrt()) < 1.5
    assert Scales.choose(made, {}, Precision.parse("fp32", "bf16")) == Scales.unit()
    assert Scales.choose(made, {"g": 900.0}, narrow).g == 1024.0


def test_scales_must_be_positive() -> None:
    with pytest.raises(RecipeError, match="the scale b_d is 0"):
        Scales(b_d=0.0)
    with pytest.raises(RecipeError, match="finite number above 0"):
        replace(Scales(), g=math.inf)


def test_a_transcoder_scales_too() -> None:
    made = SAEConfig(d_in=D_IN, d_sae=D_SAE, d_out=7, bandwidth=0.1, threshold=0.05)
    one, other = (
        Learner(made, precision=learner("topk").precision, optim=OptimConfig(lr=3e-3), scales=chosen, total_steps=60)
        for chosen in (Scales.unit(), scales(5))
    )
    mix = torch.randn(D_IN, 7, generator=torch.Generator().manual_seed(0)) / 2
    for x in batches(60):
        first, second = one.step(x, x @ mix), other.step(x, x @ mix)
    assert apart(one, other) < BOUND and abs(first.recon - second.recon) < BOUND
    assert config("jumprelu").centres and not made.centres
