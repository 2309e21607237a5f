"""Every architecture against a plain form of its loss, and the compiled passes against the general one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unit.sae.learners import BATCH, CONFIGS, D_IN, D_SAE, EXACT, apart, batches, config, learner, scales
from trimtab.errors import InputError, RecipeError
from trimtab.sae import Learner, OptimConfig, Precision, SAEConfig, Scales, fused

FAST = ["jumprelu", "jumprelu-sparse", "topk", "batchtopk"]


def trained(name: str, **settings: object) -> Learner:
    made = learner(name, **settings)
    for x in batches(4):
        made.step(x)
    made._silent[3:11] = 10**9  # dead, for the kinds that ask
    return made


def plain_loss(name: str, p: dict[str, Tensor], x: Tensor, dead: Tensor, made: SAEConfig) -> dict[str, Tensor]:
    """recon, sparsity and aux of a batch, written as the papers do; hard thresholds, no scales."""
    lam, norms = made.sparsity_coefficient, p["W_dec"].norm(dim=1)
    raw = (x - p["b_dec"]) @ p["W_enc"]
    pre = raw + p["b_enc"]
    zero = torch.zeros((), dtype=x.dtype)

    def miss(z: Tensor, decoder: Tensor = p["W_dec"], bias: Tensor = p["b_dec"]) -> Tensor:
        return ((z @ decoder + bias - x) ** 2).sum(1).mean()

    if name in ("gated", "standard"):
        opened = torch.relu(pre)
        sparsity = lam * (opened * norms).sum(1).mean()
        if name == "standard":
            return {"recon": miss(opened), "sparsity": sparsity, "aux": zero}
        z = (pre > 0) * torch.relu(raw * p["r_mag"].exp() + p["b_mag"])
        aux = miss(opened, p["W_dec"].detach(), p["b_dec"].detach())
        return {"recon": miss(z), "sparsity": sparsity, "aux": aux}
    if "topk" in name:
        acts = torch.relu(pre)
        flat = acts.reshape(1, -1) if "batch" in name else acts
        k = made.k * (len(x) if "batch" in name else 1)
        z = (acts.reshape(flat.shape) * (flat >= flat.topk(k).values[:, -1:])).reshape(acts.shape)
        aux = zero
        if dead.any():
            only = acts * dead
            some = only * (only >= only.topk(made.dead_k).values[:, -1:])
            left = (x - z @ p["W_dec"] - p["b_dec"]).detach()
            share = ((some @ p["W_dec"] - left) ** 2).sum() / ((left - left.mean(0)) ** 2).sum()
            aux = made.aux_coefficient * share
        sparsity = zero
    else:
        z = pre * (pre > p["threshold"])
        sparsity, aux = lam * (z > 0).double().sum(1).mean(), zero
        if made.penalty == "tanh":
            sparsity = lam * torch.tanh(made.steepness * z * norms).sum(1).mean()
        aux = made.pre_act_coefficient * (torch.relu(p["threshold"] - pre) * norms).sum(1).mean()
    if name.startswith("matryoshka"):
        aux = aux + sum(miss(z[:, :width], p["W_dec"][:width]) for width in made.prefixes[:-1])
    return {"recon": miss(z), "sparsity": sparsity, "aux": aux}


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_a_plain_form(name: str) -> None:
    made = trained(name, scales=scales(9))
    x, dead = batches(5)[-1].double(), made.dead()
    wanted = plain_loss(name, made.parameters_unscaled(), x, dead, made.config)
    for seen in (made.losses(x), made.step(x)):
        for figure, value in wanted.items():
            assert getattr(seen, figure) == pytest.approx(float(value), rel=1e-11, abs=1e-14), figure
        assert seen.loss == pytest.approx(float(sum(wanted.values())), rel=1e-11)
    assert "topk" not in name or wanted["aux"] > 0


@pytest.mark.parametrize("name", [name for name in CONFIGS if "jumprelu" not in name])
def test_gradients_are_those_of_the_plain_form(name: str) -> None:
    """Thresholds have pseudo-gradients (test_fused); everything else is plain autograd."""
    made = trained(name, scales=scales(9), optim={"decoder_norm": "free"})
    x, dead = batches(5)[-1].double(), made.dead()
    leaves = {key: value.clone().requires_grad_() for key, value in made.parameters_unscaled().items()}
    sum(plain_loss(name, leaves, x, dead, made.config).values()).backward()
    for key, gradient in made.gradients(x).items():
        assert torch.allclose(gradient, leaves[key].grad, rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("name", [name for name in CONFIGS if "jumprelu" in name])
def test_gradients_of_jumprelu_are_those_of_the_plain_form_with_the_published_jump(name: str) -> None:
    made = trained(name, scales=scales(9), optim={"decoder_norm": "free"})
    settings, x = made.config, batches(5)[-1].double()
    p = {key: value.clone().requires_grad_() for key, value in made.parameters_unscaled().items()}
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    z, count = fused.jump(pre, p["threshold"], settings.kernel, to_input=settings.ste_to_input)
    norms = p["W_dec"].norm(dim=1)
    loss = sum(((z[:, :width] @ p["W_dec"][:width] + p["b_dec"] - x) ** 2).sum(1).mean() for width in settings.prefixes)
    step = settings.penalty == "step"
    penalty = count if step else torch.tanh(settings.steepness * z * norms).sum()
    below = (torch.relu(p["threshold"] - pre) * norms).sum() * settings.pre_act_coefficient
    (loss + (settings.sparsity_coefficient * penalty + below) / len(x)).backward()
    for key, gradient in made.gradients(x).items():
        assert torch.allclose(gradient, p[key].grad, rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("name", FAST)
def test_compiled_passes_are_the_general_form(name: str) -> None:
    for settings in ({"scales": scales(4)}, {"precision": Precision()}):
        quick, general = learner(name, **settings), learner(name, general=True, **settings)
        bound = 1e-12 if "scales" in settings else 2e-5
        for x in batches(12, size=97):
            one, other = quick.step(x), general.step(x)
            assert one.l0 == other.l0 and one.loss == pytest.approx(other.loss, rel=bound)
        assert apart(quick, general) < bound
        assert quick.dead(97).equal(general.dead(97))


def test_few_and_many_active_latents_take_different_passes() -> None:
    """Both forms of the compiled passes are compared above: one has 10 % of latents near or above, one has not."""
    x = batches(1)[0]
    for name, sparse in (("jumprelu", False), ("jumprelu-sparse", True)):
        made = learner(name)
        near = (made.latents(x) > 0).double().mean()
        assert (float(near) < 0.1) == sparse


@pytest.mark.parametrize("k", [1, 5, D_SAE])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_exactly_k_are_kept_even_among_equals(kind: str, k: int) -> None:
    """Activations rounded to a few values tie everywhere."""
    x = (batches(1)[0] * 4).round() / 4
    made = Learner(
        SAEConfig(d_in=D_IN, d_sae=D_SAE, architecture=kind, k=k, encoder_norm=4.0), precision=EXACT, total_steps=60
    )
    for name, value in made.parameters_stored().items():
        if name == "W_enc":
            value.copy_(value.sign() / 4)
    seen = made.step(x)
    positive = made.config.d_sae * BATCH if k == D_SAE else k * BATCH
    active = torch.relu(x.double() @ torch.sign(made.parameters_unscaled()["W_enc"]) / 4) > 0
    most = min(positive, int(active.sum()) if kind == "batchtopk" else int(active.sum(1).clamp(max=k).sum()))
    assert seen.l0 * BATCH == most


def test_topk_with_fewer_positive_than_k() -> None:
    made = Learner(SAEConfig(d_in=D_IN, d_sae=D_SAE, architecture="topk", k=D_SAE), precision=EXACT, total_steps=60)
    x = batches(1)[0]
    pre = x.double() @ made.parameters_unscaled()["W_enc"]
    assert made.step(x).l0 == float((pre > 0).double().sum(1).mean())


def test_the_threshold_of_batchtopk_follows_the_smallest_latent_kept() -> None:
    made = learner("batchtopk", scales=scales(2))
    assert float(made.parameters_unscaled()["threshold"].max()) == 0.0
    followed = math.nan
    for x in batches(5):
        z = made.latents(x)
        smallest = float(z[z > 0].min())
        made.step(x)
        followed = smallest if math.isnan(followed) else followed + made.config.threshold_rate * (smallest - followed)
        assert made.parameters_unscaled()["threshold"] == pytest.approx(followed)


def test_dead_latents_learn_through_their_encoder() -> None:
    """An auxiliary loss that stops at the pre-activations revives nothing."""
    made = learner("topk", optim={"decoder_norm": "free"})
    x = batches(1)[0]
    dead = torch.arange(D_SAE) >= D_SAE // 2
    made._silent[dead] = 10**9
    made.parameters_stored()["b_enc"][dead] = -0.05
    fired = (made.latents(x) > 0).any(0)
    never = dead & ~fired
    assert never.any()
    encoder = made.gradients(x)["W_enc"]
    assert (encoder[:, never].abs().sum(0) > 0).any()
    made._silent.zero_()
    assert not made.gradients(x)["W_enc"][:, never].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "vanilla"}, "architecture is 'vanilla'; one of jumprelu, topk"),
        ({"architecture": "topk"}, "k is None; topk needs 1 to d_sae = 48"),
        ({"architecture": "topk", "k": 49}, "k is 49; topk needs 1 to d_sae = 48"),
        ({"k": 3}, "k is 3; jumprelu has none"),
        ({"d_sae": 0}, "d_sae is 0; a whole number of at least 1"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0; a finite number above 0"),
        ({"sparsity_coefficient": math.nan}, "sparsity_coefficient is nan"),
        ({"widths": (4, 48)}, "only Matryoshka kinds have nested prefixes, not jumprelu"),
        ({"architecture": "matryoshka-jumprelu", "widths": (9, 4, 48)}, "rising numbers that end with d_sae = 48"),
        ({"d_out": 3, "subtract_b_dec": True}, "b_dec has width 3 and cannot be subtracted from activations of 16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, **settings})


def test_a_configuration_is_read_back_and_an_unknown_key_refused() -> None:
    for name in CONFIGS:
        assert SAEConfig.of(config(name).to_dict()) == config(name)
    made = config("matryoshka-batchtopk", widths=(6, 20, D_SAE))
    assert SAEConfig.of(made.to_dict()) == made and made.prefixes == (6, 20, D_SAE)
    assert config("matryoshka-jumprelu").prefixes == (3, 6, 12, 24, 48)
    with pytest.raises(RecipeError, match="'lambda' is no setting of SAEConfig; there are architecture"):
        SAEConfig.of({"lambda": 3})
    assert OptimConfig.of(OptimConfig(clip=2.0).to_dict()) == OptimConfig(clip=2.0)


def test_widths_of_activations_and_targets_are_checked() -> None:
    made = Learner(SAEConfig(d_in=D_IN, d_sae=D_SAE, d_out=5), scales=Scales.unit(), total_steps=9)
    x = batches(1)[0]
    with pytest.raises(InputError, match=r"activations are \(64, 15\); \[batch, 16\] was expected"):
        made.step(x[:, :15], x[:, :5])
    with pytest.raises(InputError, match=r"the target of a transcoder is missing; \[batch, 5\]"):
        made.step(x)
    with pytest.raises(InputError, match=r"targets are \(64, 4\); \[64, 5\] was expected"):
        made.step(x, x[:, :4])
    assert made.latents(x).shape == (64, D_SAE) and made.reconstruct(x).shape == (64, 5)
