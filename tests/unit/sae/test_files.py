"""Files of autoencoders: what is written, Gemma Scope's archives, decoder rows, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.sae.factory import D_IN, Learned, config, parameters, sae
from trimtab.directions import load_direction
from trimtab.directions.sae_file import hook_of_site, site_of_hook
from trimtab.errors import InputError, VectorError
from trimtab.sae.files import load, save
from trimtab.sae.model import NAMES, SAE

KINDS = ("standard", "jumprelu", "topk", "gated", "batchtopk", "matryoshka-jumprelu")


def equal(a: SAE, b: SAE) -> bool:
    for name in NAMES:
        one, other = getattr(a, name), getattr(b, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            return False
    return (a.architecture, a.k, a.subtract_b_dec, a.site, a.target_site, a.trained_as) == (
        b.architecture,
        b.k,
        b.subtract_b_dec,
        b.site,
        b.target_site,
        b.trained_as,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    one = sae(kind, norm=3.4, site="layers.3.resid_post", about={"precision": "fp32/bf16"})
    found = load(save(one, tmp_path / "a" / "b"))
    assert equal(found, one)
    assert found.about["norm"] == 3.4
    assert found.about["precision"] == "fp32/bf16"
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated"])
def test_a_transcoder_comes_back(tmp_path: Path, kind: str) -> None:
    one = SAE.of(
        Learned(config(kind, d_out=9), parameters(kind, d_out=9)),
        target_norm=2.0,
        site="layers.3.resid_mid",
        target_site="layers.3.mlp_out",
    )
    found = load(save(one, tmp_path))
    assert equal(found, one)
    assert found.is_transcoder


def test_an_autoencoder_is_replaced_and_given_back_as_it_is(tmp_path: Path) -> None:
    save(sae("gated"), tmp_path)
    one = sae("jumprelu")
    assert equal(load(save(one, tmp_path)), one)
    assert load(one) is one
    assert equal(load(tmp_path / "sae_weights.safetensors"), one)


def test_gemma_scope_is_the_published_formula(tmp_path: Path) -> None:
    """Encoding without subtracting b_dec, as the notebook that came with the weights does."""
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    arrays = {name: one.numpy() for name, one in parameters("jumprelu").items()}
    np.savez(folder / "params.npz", **arrays)
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(0))
    pre = x.numpy() @ arrays["W_enc"] + arrays["b_enc"]
    z = (pre > arrays["threshold"]) * np.maximum(pre, 0)
    for path in (folder, folder / "params.npz"):
        found = load(path)
        np.testing.assert_allclose(found.encode(x).numpy(), z, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found(x).numpy(), z @ arrays["W_dec"] + arrays["b_dec"], rtol=1e-5, atol=1e-5)
        assert found.site == "layers.12.resid_post"
        assert found.architecture == "jumprelu"
        assert not found.subtract_b_dec


def test_weights_alone_are_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    save_file(parameters("jumprelu"), file)
    assert load(file).architecture == "jumprelu"
    save_file({name: one for name, one in parameters("jumprelu").items() if name != "threshold"}, file)
    assert load(file).architecture == "standard"


@pytest.mark.parametrize("kind", ["directory", "npz", "weights"])
def test_a_decoder_row_is_a_direction(tmp_path: Path, kind: str) -> None:
    one = sae("jumprelu", site="layers.3.resid_post")
    save(one, tmp_path / "sae")
    np.savez(tmp_path / "params.npz", W_enc=one.W_enc, W_dec=one.W_dec)
    save_file({"W_enc": one.W_enc, "W_dec": one.W_dec}, tmp_path / "bare.safetensors")
    place = {"directory": "sae", "npz": "params.npz", "weights": "bare.safetensors"}[kind]
    found = load_direction(tmp_path / place, key="latent:17")
    assert torch.equal(found.vector, one.W_dec[17])
    assert torch.equal(load_direction(f"{tmp_path / place}:latent:17").vector, found.vector)
    assert str(found.site) == ("layers.3.resid_post" if kind == "directory" else "None")
    for key in (None, "latent:40", "17"):
        with pytest.raises(VectorError, match=r"latents 0 to 39.*name one as latent:0"):
            load_direction(tmp_path / place, key=key)


def test_a_transcoder_steers_where_it_writes(tmp_path: Path) -> None:
    one = SAE.of(
        Learned(config("jumprelu", d_out=9), parameters("jumprelu", d_out=9)),
        site="layers.3.resid_mid",
        target_site="layers.3.mlp_out",
    )
    save(one, tmp_path)
    found = load_direction(tmp_path, key="latent:0")
    assert (str(found.site), len(found.vector)) == ("layers.3.mlp_out", 9)


@pytest.mark.parametrize(
    ("site", "hook"),
    [
        ("layers.12.resid_post", "blocks.12.hook_resid_post"),
        ("layers.0.mlp_out", "blocks.0.hook_mlp_out"),
        ("layers.3.attn_z", "blocks.3.attn.hook_z"),
        ("embed", "hook_embed"),
        ("layers.3.mlp_raw", "layers.3.mlp_raw"),
        ("module:encoder.block.3.output", "module:encoder.block.3.output"),
    ],
)
def test_sites_have_the_names_of_transformer_lens(site: str, hook: str) -> None:
    assert hook_of_site(site) == hook
    assert site_of_hook(hook) == site


def test_an_unknown_hook_is_no_site() -> None:
    assert site_of_hook("blocks.3.hook_nothing") == ""
    assert site_of_hook("h.3.what") == ""


def change(**values: Any) -> Any:
    def apply(folder: Path) -> None:
        file = folder / "cfg.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return apply


def drop(name: str) -> Any:
    def apply(folder: Path) -> None:
        file = folder / "sae_weights.safetensors"
        save_file({key: one for key, one in load_file(file).items() if key != name}, file)

    return apply


def add(name: str) -> Any:
    def apply(folder: Path) -> None:
        file = folder / "sae_weights.safetensors"
        save_file({**load_file(file), name: torch.zeros(2)}, file)

    return apply


def write(name: str, data: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(architecture="temporal"), "architecture 'temporal' is not known; known are standard"),
        (change(normalize_activations="layer_norm"), "normalize_activations is 'layer_norm'"),
        (change(normalize_activations="expected_average_only_in"), "'expected_average_only_in', which depends"),
        (change(architecture="gated"), "gated needs b_mag"),
        (drop("W_dec"), "no tensor 'W_dec'; it has: W_enc, b_dec, b_enc, threshold"),
        (drop("threshold"), "jumprelu needs threshold"),
        (add("W_skip"), "tensor 'W_skip' is not known"),
        (write("cfg.json", b"{"), "is not JSON"),
        (write("cfg.json", b"[]"), "holds a list; an object was expected"),
        (write("sae_weights.safetensors", b"no"), "not a readable safetensors file"),
        (lambda folder: (folder / "cfg.json").unlink(), "cfg.json cannot be read"),
    ],
)
def test_files_that_are_not_right_are_refused_in_one_line(tmp_path: Path, spoil: Any, message: str) -> None:
    save(sae("jumprelu"), tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; give a directory with cfg\.json"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match="is no directory of an autoencoder"):
        load(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"PK no")
    with pytest.raises(InputError, match="not an archive of arrays"):
        load(tmp_path)


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="not an archive of arrays"):
        load(tmp_path / "params.npz")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(sae(), tmp_path / "file" / "sae")
