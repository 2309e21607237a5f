"""A learner resumes bit by bit, repeats itself, tests itself, and skips what is not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.unit.sae.learners import BATCH, CONFIGS, D_IN, D_SAE, batches, config, learner, scales
from trimtab.errors import InputError
from trimtab.sae import Learner, OptimConfig, Precision, SAEConfig, fused
from trimtab.sae.model import SAE

PRECISIONS = [Precision.parse("fp32"), Precision.parse("fp32", "bf16"), Precision.parse("fp16")]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_goes_on_bit_by_bit_from_its_state(name: str) -> None:
    target = None if "topk" in name else 9.0
    for precision in PRECISIONS:
        settings = {"precision": precision, "scales": None, "optim": {"target_l0": target, "beta1": 0.5}}
        whole, parted = learner(name, **settings), learner(name, **settings)
        data = batches(12)
        for x in data[:5]:
            parted.step(x)
        kept = {key: value.clone() for key, value in parted.state().items()}
        assert all(value.is_contiguous() for value in kept.values())
        again = learner(name, seed=1, **settings)
        again.load_state(kept)
        for number, x in enumerate(data):
            wanted = whole.step(x)
            if number >= 5:
                assert again.step(x) == wanted
        for key, value in whole.state().items():
            assert torch.equal(value, again.state()[key]) or key == "cut", key


def test_two_runs_are_one() -> None:
    one, other = (learner("jumprelu", precision=PRECISIONS[1]) for _ in range(2))
    for x in batches(10):
        assert one.step(x) == other.step(x)
    assert all(value.equal(other.state()[name]) for name, value in one.state().items() if name != "cut")
    seeded = learner("jumprelu", seed=1)
    assert not seeded.parameters_unscaled()["W_enc"].equal(learner("jumprelu").parameters_unscaled()["W_enc"])


def test_a_step_does_not_depend_on_threads() -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            made = [learner(name, precision=Precision()) for name in ("jumprelu", "jumprelu-sparse", "batchtopk")]
            for x in batches(3, size=200):
                for one in made:
                    one.step(x)
        finally:
            torch.set_num_threads(1)
        found.append([one.parameters_unscaled()["W_dec"] for one in made])
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(found[0], other, strict=True))


def test_a_state_of_another_kind_is_refused() -> None:
    state = learner("jumprelu").state()
    with pytest.raises(InputError, match=r"unknown 'parameter\.threshold'"):
        learner("standard").load_state(state)
    with pytest.raises(InputError, match=r"the state lacks 'parameter\.threshold'"):
        learner("jumprelu").load_state(learner("standard").state())
    with pytest.raises(InputError, match=r"'parameter.W_dec' in the state is \(48, 16\) torch.float64; .*float32 was"):
        learner("jumprelu", precision=Precision()).load_state(state)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_gradient_at_step_0(name: str) -> None:
    made = learner(name, precision=Precision(), optim={"sparsity_warmup": 1000})
    seen = made.self_test(batches(1, size=256)[0])
    assert seen.passed and seen.problems == ()
    assert seen.gradients.keys() == made.parameters_stored().keys()
    assert all(value > 0 for value in seen.gradients.values())


def test_a_mask_without_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fused function that answers zeros, and a boolean mask, did: L0 has no path and thresholds stay."""

    def stopped(pre, threshold, bandwidth, *, to_input):
        mask = pre > threshold
        return pre.detach() * mask, mask.sum().to(threshold.dtype)

    monkeypatch.setattr(fused, "jump", stopped)
    seen = learner("jumprelu", general=True).self_test(batches(1)[0])
    assert not seen.passed
    assert "W_enc: the gradient is 0 everywhere" in seen.problems
    assert "threshold: the gradient is 0 everywhere" in seen.problems
    assert "sparsity: it reaches no parameter, so L0 cannot change" in seen.problems


def test_thresholds_out_of_reach_are_found() -> None:
    made = Learner(SAEConfig(d_in=D_IN, d_sae=D_SAE, threshold=50.0), total_steps=60)
    seen = made.self_test(batches(1)[0])
    assert [one.partition(":")[0] for one in seen.problems] == ["W_enc", "W_dec", "b_enc", "threshold", "sparsity"]
    assert seen.zeros["threshold"] == 1.0


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    made = learner("jumprelu", precision=Precision())
    before = {name: value.clone() for name, value in made.parameters_stored().items()}
    x = batches(1)[0]
    x[3, 4] = math.nan
    seen = made.step(x)
    assert seen.skipped and math.isnan(seen.loss) and made.steps == 1
    assert all(value.equal(before[name]) for name, value in made.parameters_stored().items())
    assert not made.step(batches(1)[0]).skipped


def test_float16_without_scales_overflows_or_vanishes_and_with_them_does_not() -> None:
    """A decoder bias collects the whole batch, and all latents: the source's scale overflowed there at step 0."""
    chosen = learner("jumprelu", precision=Precision.parse("fp16"), scales=None).scales
    huge = Precision.parse("fp32", "fp16")
    for g, good in ((chosen.g, True), (chosen.g * 2.0**20, False)):
        made = learner("jumprelu", precision=huge, scales=replace(chosen, g=g))
        assert made.step(batches(1)[0]).skipped != good


def test_dead_latents_are_counted_by_tokens() -> None:
    made = learner("jumprelu-sparse")
    x = batches(1)[0]
    fires = (made.latents(x) > 0).any(0)
    assert 0 < int(fires.sum()) < D_SAE
    made.step(x)
    assert made.dead(BATCH).equal(~fires) and not made.dead(BATCH + 1).any() and not made.dead().any()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_trained_is_what_is_used(name: str) -> None:
    """The unscaled parameters, in the inference form, give the latents and the reconstruction of training."""
    made = learner(name, scales=scales(6), precision=Precision())
    for x in batches(6):
        made.step(x)
    x = batches(7)[-1]
    used = SAE.of(made)
    if "batch" in name:  # it goes by one threshold, which follows what training keeps, batch by batch
        assert float(used.encode(x).gt(0).sum(1).double().mean()) == pytest.approx(5.0, rel=0.3)
        return
    assert torch.allclose(used.encode(x), made.latents(x), atol=2e-6)
    assert torch.allclose(used.forward(x), made.reconstruct(x), atol=5e-6)


def test_losses_and_gradients_move_nothing() -> None:
    made = learner("batchtopk")
    before = {key: value.clone() for key, value in made.state().items()}
    x = batches(1)[0]
    seen = made.losses(x)
    made.gradients(x)
    made.latents(x)
    made.self_test(x)
    assert all(torch.equal(value, before[key]) for key, value in made.state().items() if key != "cut")
    moved = made.step(x)
    assert math.isnan(seen.grad_norm) and moved.grad_norm > 0
    assert (seen.recon, seen.l0, seen.lr) == (pytest.approx(moved.recon, rel=1e-12), moved.l0, moved.lr)


def test_parameters_have_the_names_and_shapes_of_saelens() -> None:
    shapes = {name: tuple(value.shape) for name, value in learner("gated").parameters_unscaled().items()}
    latents = dict.fromkeys(("b_enc", "b_mag", "r_mag"), (D_SAE,))
    assert shapes == {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), **latents}
    assert "threshold" not in learner("topk").parameters_unscaled()
    assert learner("batchtopk").parameters_unscaled()["threshold"].shape == (D_SAE,)
    first = learner("jumprelu").parameters_unscaled()
    assert torch.allclose(first["W_enc"].t(), first["W_dec"] * (D_IN / D_SAE))


def test_the_first_reconstruction_is_along_x() -> None:
    """The start that the monitor's rules are about: near x / 2, half of the latents active."""
    made = Learner(SAEConfig(d_in=64, d_sae=24 * 64), total_steps=60)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) / 8
    seen = made.losses(x)
    assert 0.2 < seen.recon < 0.4 and 0.3 < seen.l0 / (24 * 64) < 0.6


def test_compiling_the_loss_changes_nothing_but_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function: asked.append(function) or function)
    made = Learner(config("topk"), optim=OptimConfig(), compile=True, total_steps=60)
    plain = Learner(config("topk"), optim=OptimConfig(), total_steps=60)
    assert made.step(batches(1)[0]).loss == pytest.approx(plain.step(batches(1)[0]).loss, rel=1e-6)
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_agrees_with_the_cpu(name: str) -> None:
    cpu, gpu = (learner(name, precision=Precision(), device=device) for device in ("cpu", "cuda"))
    for x in batches(10):
        one, other = cpu.step(x), gpu.step(x)
    assert other.loss == pytest.approx(one.loss, rel=1e-3)
