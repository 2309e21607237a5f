"""A latent becomes a steering of the strength that it really reaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.sae.factory import Learned, config, sae
from trimtab.backends import Capture, Request, open_backend
from trimtab.directions import load_direction
from trimtab.errors import InputError
from trimtab.results.sae_evaluation import SAEExport
from trimtab.sae import export, latent_vector, load, save
from trimtab.sae._sets import RowKeeper
from trimtab.sae.model import SAE
from trimtab.steering import Steering, SteeringVector

SITE = "layers.3.resid_post"
TEXTS = ["the fox rested near the tower .", "nobody forgot the lonely sparrow by the market ."]


def rows(count: int = 400) -> Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def wide() -> SAE:
    """An autoencoder of the testbed's width."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(128, 24, generator=generator) * 0.1,
        "W_dec": torch.randn(24, 128, generator=generator) * 0.1,
        "b_enc": torch.zeros(24),
        "b_dec": torch.zeros(128),
    }
    return SAE.of(Learned(config("standard"), tensors), site=SITE)


def test_strength_one_is_the_largest_activation() -> None:
    one = sae("jumprelu", site=SITE)
    x = rows()
    made = latent_vector(one, 17, x)
    z = one.to(dtype=torch.float64).encode(x)[:, 17].numpy()
    active = z[z > 0]
    assert made.largest == pytest.approx(active.max(), rel=1e-6)
    assert made.density == pytest.approx(len(active) / len(z))
    for share, value in made.active_quantiles.items():
        assert value == pytest.approx(np.quantile(active, share), rel=1e-5)
    torch.testing.assert_close(made.vector.vector, one.W_dec[17] * float(active.max()))
    unit = one.W_dec[17].double() / one.W_dec[17].double().norm()
    assert made.vector.median_norm == pytest.approx(float(x.double().norm(dim=1).quantile(0.5)), rel=1e-6)
    assert made.vector.quantile(0.9) == pytest.approx(float((x.double() @ unit).quantile(0.9)), rel=1e-4)
    assert str(made.vector.site) == SITE
    recipe = made.vector.recipe
    assert (recipe["latent"], recipe["tokens"], recipe["max_activation"]) == (17, 400, made.largest)


def test_the_steering_adds_that_vector(wide: SAE) -> None:
    """Through the model: what comes out of the site differs by the share asked for of the calibrated vector."""
    made = latent_vector(wide, 5, TEXTS, tokens=100)
    backend = open_backend("hf", "testbed", device="cpu")
    found = {}
    for name, steering in (("plain", None), ("steered", made.steering(0.5, positions="2:"))):
        keeper = RowKeeper()
        request = Request(prompt=TEXTS[0], id="a", steering=steering, max_new_tokens=0)
        backend.generate([request], capture=Capture(sites=(SITE,)), writer=keeper)
        found[name] = keeper.of(SITE, "a")
    delta = found["steered"] - found["plain"]
    assert torch.equal(delta[:2], torch.zeros_like(delta[:2]))
    expected = (wide.W_dec[5] * made.largest * 0.5).expand_as(delta[2:])
    torch.testing.assert_close(delta[2:], expected, rtol=1e-4, atol=1e-4)
    assert made.vector.model_digest == backend.info.weights_digest


def test_a_latent_is_written_as_vector_and_steering(tmp_path: Path, wide: SAE) -> None:
    save(wide, tmp_path / "sae")
    made = export(tmp_path / "sae", tmp_path / "out", latent=5, scale=2.0, positions="generated", data=TEXTS)
    assert isinstance(made, SAEExport) and made.latent is not None
    assert made.files == ("steering.safetensors", "vector.safetensors")
    steering = Steering.load(tmp_path / "out" / "steering.safetensors")
    vector = SteeringVector.load(tmp_path / "out" / "vector.safetensors")
    assert steering.digest == made.latent.steering_digest
    assert steering.describe().endswith(f"at {SITE} on generated")
    assert vector.norm == pytest.approx(made.latent.norm)
    assert made.latent.norm == pytest.approx(made.latent.max_activation * float(wide.W_dec[5].double().norm()))
    assert load_direction(tmp_path / "out" / "vector.safetensors").calibrated == vector


def test_an_autoencoder_is_written_for_saelens(tmp_path: Path) -> None:
    one = sae("gated", site=SITE)
    made = export(one, tmp_path / "out")
    assert made.files == ("cfg.json", "sae_weights.safetensors")
    assert (made.architecture, made.trained_as, made.latent) == ("gated", "gated", None)
    assert torch.equal(load(tmp_path / "out").W_dec, one.W_dec)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one, out: latent_vector(one, 40, rows()), "latent 40 was asked for; there are 0 to 39"),
        (lambda one, out: latent_vector(one, 3, torch.full((5, 12), -1e3)), "latent 3 never fires on 5 tokens"),
        (lambda one, out: export(one, out, scale=2.0), "are of a latent, and none was named"),
        (lambda one, out: export(one, out, tokens=5), "tokens are of a latent"),
        (lambda one, out: export(one, out, latent=3, data=rows()), "does not say its site"),
        (lambda one, out: latent_vector(one, 3, TEXTS), "does not say its site"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, call: Any, message: str) -> None:

    one = replace(sae("jumprelu"), b_enc=torch.zeros(40), threshold=torch.full((40,), 1e-3))
    if "never" in message:
        one = replace(one, threshold=torch.full((40,), 1e6))
    with pytest.raises(InputError, match=message) as caught:
        call(one, tmp_path / "out")
    assert "\n" not in str(caught.value)
