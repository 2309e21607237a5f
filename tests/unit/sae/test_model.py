"""The inference form against formulas written out in numpy, its units, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.sae import learners
from tests.unit.sae.factory import D_IN, D_SAE, Learned, config, parameters, sae
from trimtab.errors import InputError, VectorError
from trimtab.sae.model import SAE

KINDS = ("standard", "jumprelu", "topk", "gated", "batchtopk", "matryoshka-batchtopk", "matryoshka-jumprelu")
Array = np.ndarray[Any, Any]


def activations(rows: int = 50) -> torch.Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(1)) * 1.5


def reference(kind: str, x: Array) -> tuple[Array, Array]:
    """Latents and reconstruction by the formulas, one row at a time, in float64."""
    p = {name: one.double().numpy() for name, one in parameters(kind).items()}
    latents, made = [], []
    for row in x.astype(np.float64):
        centred = row - p["b_dec"]
        pre = np.array([centred @ p["W_enc"][:, i] for i in range(D_SAE)])
        if kind == "gated":
            gate = pre + p["b_gate"]
            size = np.maximum(np.exp(p["r_mag"]) * pre + p["b_mag"], 0)
            z = np.where(gate > 0, size, 0)
        else:
            pre = pre + p["b_enc"]
            z = np.maximum(pre, 0)
            if kind == "topk":
                z[np.argsort(-pre)[6:]] = 0
            if "threshold" in p:
                z = np.where(pre > p["threshold"], z, 0)
        latents.append(z)
        made.append(sum(z[i] * p["W_dec"][i] for i in range(D_SAE)) + p["b_dec"])
    return np.array(latents), np.array(made)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_reconstruction_are_the_formulas(kind: str) -> None:
    x = activations()
    z, y = reference(kind, x.numpy())
    one = sae(kind).to(dtype=torch.float64)
    np.testing.assert_allclose(one.encode(x).numpy(), z, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(one(x).numpy(), y, rtol=1e-12, atol=1e-12)
    assert 0 < (z > 0).mean() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_the_data_goes_into_the_biases(kind: str) -> None:
    """Hidden units: latents and reconstruction grow with the norm, the weights keep every bit."""
    x, norm = activations(), 3.4
    bare = sae(kind).to(dtype=torch.float64)
    scaled = sae(kind, norm=norm)
    assert torch.equal(scaled.W_enc, bare.W_enc.float())
    assert torch.equal(scaled.W_dec, bare.W_dec.float())
    wide = scaled.to(dtype=torch.float64)
    torch.testing.assert_close(wide.encode(x.double() * norm), bare.encode(x) * norm, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wide(x.double() * norm), bare(x) * norm, rtol=1e-5, atol=1e-6)
    assert scaled.about["norm"] == norm


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("centres", [False, True])
def test_a_transcoder_has_a_norm_for_each_side(kind: str, centres: bool) -> None:
    x, norm, other = activations(), 3.4, 0.7
    about = config(kind)
    about.centres = centres
    tensors = {name: one.double() for name, one in parameters(kind).items()}
    found = SAE.of(Learned(about, dict(tensors)), norm=norm, target_norm=other, site="layers.1.resid_mid")
    plain = SAE.of(Learned(about, dict(tensors))).to(dtype=torch.float64)
    assert plain.subtract_b_dec is centres
    wide = found.to(dtype=torch.float64)
    torch.testing.assert_close(wide(x.double() * norm), plain(x) * other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide.encode(x.double() * norm), plain.encode(x) * norm, rtol=1e-5, atol=1e-5)


def test_a_jump_at_the_threshold_is_strict() -> None:
    one = sae("jumprelu")
    pre = (torch.zeros(D_IN) - one.b_dec) @ one.W_enc + one.b_enc
    exact = replace(one, threshold=pre.abs())
    assert not bool((exact.encode(torch.zeros(1, D_IN)) > 0).any())


def test_leading_axes_are_kept() -> None:
    one = sae("topk")
    x = activations(24)
    assert torch.equal(one(x.reshape(2, 3, 4, D_IN)).reshape(24, D_IN), one(x))


def test_a_copy_in_another_dtype_computes_in_it() -> None:
    low = sae("jumprelu").to(dtype=torch.bfloat16)
    assert low.encode(activations()).dtype is torch.bfloat16
    assert low(activations()).dtype is torch.bfloat16


def test_activations_of_another_width_name_both() -> None:
    with pytest.raises(VectorError, match="width 11, and the autoencoder's is 12"):
        sae().encode(torch.zeros(3, 11))
    with pytest.raises(VectorError, match="39 latents were given, and the autoencoder has 40"):
        sae().decode(torch.zeros(3, 39))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "relu"}, "architecture is 'relu'; one of standard, jumprelu, topk, gated"),
        ({"threshold": None}, "jumprelu needs threshold"),
        ({"b_enc": torch.zeros(3)}, r"b_enc is \[3\]; \[40\] was expected"),
        ({"b_dec": torch.zeros(40)}, r"b_dec is \[40\]; \[12\] was expected"),
        ({"W_dec": torch.zeros(39, D_IN)}, r"W_enc is \[12, 40\] and W_dec \[39, 12\]"),
        ({"W_enc": torch.full((D_IN, D_SAE), math.nan)}, "W_enc has 480 values that are not finite"),
        ({"threshold": torch.full((D_SAE,), -1.0)}, "threshold has values under 0.*never estimated"),
        ({"architecture": "topk"}, "k is None; 1 to 40"),
        ({"architecture": "topk", "k": 41}, "k is 41; 1 to 40"),
        ({"architecture": "gated"}, "gated needs b_mag"),
        ({"site": "nowhere.3"}, "nowhere"),
        (
            {"W_dec": torch.zeros(D_SAE, 9), "b_dec": torch.zeros(9)},
            "an input of width 12 cannot have b_dec of width 9",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(sae("jumprelu"), **changes)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_a_norm_is_a_number_above_zero(norm: float) -> None:
    with pytest.raises(InputError, match="a finite number above 0"):
        sae().in_units_of(norm)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka-batchtopk"])
def test_a_trained_batchtopk_goes_by_its_threshold(kind: str) -> None:
    """k latents on average over the batch in training, about as many by the threshold after it."""
    one = learners.learner(kind, scales=learners.scales(3))
    for batch in learners.batches(300):
        one.step(batch)
    found = SAE.of(one, norm=2.0)
    assert found.architecture == "jumprelu"
    assert found.threshold is not None
    assert len(found.threshold.unique()) == 1 and float(found.threshold[0]) > 0
    fresh = torch.cat(learners.batches(4))
    assert float((found.encode(fresh * 2.0) > 0).double().sum(dim=1).mean()) == pytest.approx(5, rel=0.3)
