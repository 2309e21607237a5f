"""Files of autoencoders: SAELens's format both ways, which is our own too, and Gemma Scope's archives.

A directory holds `cfg.json` and `sae_weights.safetensors`. What SAELens does not know stands under `metadata`, which it
keeps without reading: `site`, `target_site`, `trained_as`, `norm` and whatever the training adds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from trimtab._base import jsonio
from trimtab._base.files import atomic_write_bytes, atomic_write_text
from trimtab._version import __version__
from trimtab.directions.sae_file import (
    CONFIG,
    PARAMETERS,
    WEIGHTS,
    hook_of_site,
    read_config,
    read_npz,
    site_of_hook,
    sites_of_config,
)
from trimtab.errors import InputError
from trimtab.sae.model import NAMES, SAE, Architecture

SAELENS_VERSION = "6.54.12"
"""Version whose files these are."""
_READ: dict[str, Architecture] = {
    "standard": "standard",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "topk_transcoder": "topk",
    "gated_transcoder": "gated",
}
_TRANSCODERS: dict[Architecture, str] = {
    "standard": "transcoder",
    "jumprelu": "jumprelu_transcoder",
    "topk": "topk_transcoder",
    "gated": "gated_transcoder",
}
"""SAELens has the first two; it refuses the others by their names."""


def save(sae: SAE, directory: str | os.PathLike[str]) -> Path:
    """Write an autoencoder as `cfg.json` and `sae_weights.safetensors`; SAELens reads it with `SAE.load_from_disk`.

    Weights are written as they are, for activations in hidden units, so nothing has to be normalised first. A
    transcoder of the kinds topk and gated is readable here only: SAELens has none.

    Args:
        sae: float32, float16, bfloat16 or float64.
        directory: made when it is missing; an autoencoder there is replaced.

    Returns:
        The directory.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(directory)
    tensors = {name: getattr(sae, name) for name in NAMES if getattr(sae, name) is not None}
    if sae.architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    packed = safetensors.torch.save({name: one.contiguous() for name, one in tensors.items()}, {"format": "pt"})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(folder / WEIGHTS, packed)
        atomic_write_text(folder / CONFIG, jsonio.dumps(_config(sae), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def _config(sae: SAE) -> dict[str, Any]:
    crosses = not sae.subtract_b_dec and sae.is_transcoder
    about = {
        **sae.about,
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "trimtab_version": __version__,
    }
    for name, hook in (("site", "hook_name"), ("target_site", "hook_name_out")):
        site = getattr(sae, name)
        about |= {name: site, hook: hook_of_site(site)} if site else {}
    return {
        "architecture": _TRANSCODERS[sae.architecture] if crosses else sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **({"d_out": sae.d_out} if crosses else {}),
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.architecture == "topk" else {}),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": about,
    }


def load(path: str | os.PathLike[str] | SAE) -> SAE:
    """Read an autoencoder.

    Args:
        path: a directory of ours or of SAELens (one saved for inference, or a training checkpoint), that of a training
            here of a single autoencoder, a directory with Gemma Scope's `params.npz`, that archive, a safetensors file
            with the weights alone, or an autoencoder, which is returned. Weights alone, and Gemma Scope's, are jumprelu
            where there are thresholds, else standard.

    Returns:
        The autoencoder, float32 on the CPU, for activations in hidden units.

    Raises:
        InputError: not such a file, an architecture or a normalisation that is not known, or tensors that do not fit.
    """
    if isinstance(path, SAE):
        return path
    place = Path(path)
    if place.is_dir() and (place / WEIGHTS).is_file():
        return _saelens(place)
    if place.is_dir() and (place / PARAMETERS).is_file():
        place = place / PARAMETERS
    trained = members(place)
    if len(trained) > 1:
        names = ", ".join(one.name for one in trained)
        raise InputError(f"{place} holds several autoencoders ({names}); give the directory of one")
    if trained:
        return _saelens(trained[0])
    if place.suffix == ".npz" and place.is_file():
        return _gemma_scope(place)
    if place.suffix == ".safetensors" and place.is_file():
        return _saelens(place.parent) if place.name == WEIGHTS and _has_config(place) else _bare(place)
    what = "is no directory of an autoencoder" if place.is_dir() else "is no file of an autoencoder"
    raise InputError(
        f"{place} {what if place.exists() else 'does not exist'}; give a directory with {CONFIG} and {WEIGHTS}, a "
        f"{PARAMETERS} of Gemma Scope, or a safetensors file with W_enc and W_dec"
    )


def members(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the directories of autoencoders in the directory of a training, by name; none elsewhere."""
    place = Path(path)
    if not place.is_dir() or (place / WEIGHTS).is_file():
        return ()
    return tuple(sorted(one for one in place.iterdir() if (one / WEIGHTS).is_file()))


def _has_config(weights: Path) -> bool:
    return (weights.parent / CONFIG).is_file()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return {name: one.float() for name, one in safetensors.torch.load_file(path).items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def _saelens(folder: Path) -> SAE:
    config = read_config(folder)
    named = str(config.get("architecture", "standard"))
    if named == "standard" and config.get("activation_fn_str", config.get("activation_fn")) == "topk":
        named, config = "topk", {**config, "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    if named not in _READ:
        raise InputError(f"{folder}: architecture {named!r} is not known; known are {', '.join(_READ)}")
    tensors = _tensors(folder / WEIGHTS)
    if config.get("rescale_acts_by_decoder_norm"):
        _fold_decoder_norm(tensors)
    if "topk_threshold" in tensors:  # a training checkpoint of BatchTopK, in units of pre-activation
        tensors["threshold"] = tensors.pop("topk_threshold").expand(tensors["W_enc"].shape[-1]).contiguous()
    scale = _input_scale(folder, config)
    site, target = sites_of_config(config)
    about = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    assert isinstance(about, dict)
    trained = about.get("trained_as") or about.get("training_architecture") or named
    made = _make(
        tensors,
        str(folder),
        _READ[named],
        k=config.get("k"),
        subtract_b_dec=bool(config.get("apply_b_dec_to_input", "transcoder" not in named)),
        site=site,
        target_site=target if target != site else "",
        about={**about, "trained_as": str(trained).replace("_batchtopk", "-batchtopk")},
    )
    return made if scale == 1 else made.in_units_of(1 / scale)


def _fold_decoder_norm(tensors: dict[str, Tensor]) -> None:
    """Give the decoder unit rows; pre-activations grow by what the rows were long, as SAELens ranks them."""
    norms = tensors["W_dec"].norm(dim=-1)
    tensors["W_enc"] = tensors["W_enc"] * norms
    tensors["b_enc"] = tensors["b_enc"] * norms
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]


def _input_scale(folder: Path, config: Mapping[str, Any]) -> float:
    """Return what activations are multiplied by before they are encoded."""
    kind = config.get("normalize_activations") or "none"
    if kind in ("none", False):
        return 1.0
    file = folder / "activation_scaler.json"
    if kind == "expected_average_only_in" and file.is_file():
        found = jsonio.loads(file.read_bytes(), file)
        scale = found.get("scaling_factor") if isinstance(found, dict) else None
        if isinstance(scale, (int, float)) and scale > 0:
            return float(scale)
        raise InputError(f"{file} has no scaling_factor above 0")
    raise InputError(
        f"{folder}: normalize_activations is {kind!r}, which depends on each token or on a file that is not there; "
        "save it with its normalisation folded in (save_inference_model)"
    )


def _gemma_scope(path: Path) -> SAE:
    config = read_config(path.parent) if (path.parent / CONFIG).is_file() else {}
    site = _gemma_site(path)
    about = {"trained_as": "jumprelu", "source": str(path)}
    sites = sites_of_config(config)
    return _make(read_npz(path), str(path), None, subtract_b_dec=False, site=sites[0] or site, about=about)


def _gemma_site(path: Path) -> str:
    """Return the site that the published folders name: `.../layer_12/width_16k/average_l0_82/params.npz`."""
    layer = next((part.removeprefix("layer_") for part in path.parts if part.startswith("layer_")), "")
    return site_of_hook(f"blocks.{layer}.hook_resid_post") if layer.isdecimal() and "-res" in str(path) else ""


def _bare(path: Path) -> SAE:
    return _make(_tensors(path), str(path), None, about={"source": str(path)})


def _make(tensors: dict[str, Tensor], where: str, architecture: Architecture | None, **more: Any) -> SAE:
    if "b_gate" in tensors:
        tensors["b_enc"] = tensors.pop("b_gate")
    if architecture is None:
        architecture = "gated" if "b_mag" in tensors else "jumprelu" if "threshold" in tensors else "standard"
    missing = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec") if name not in tensors]
    if missing:
        raise InputError(f"{where}: no tensor {missing[0]!r}; it has: {', '.join(sorted(tensors)) or 'none'}")
    scaling = tensors.pop("scaling_factor", tensors.pop("finetuning_scaling_factor", None))
    if scaling is not None and not bool((scaling == 1).all()):
        tensors["W_dec"] = tensors["W_dec"] * scaling[:, None]
    unknown = sorted(set(tensors) - set(NAMES))
    if unknown:
        raise InputError(f"{where}: tensor {unknown[0]!r} is not known; known are {', '.join(NAMES)}")
    try:
        return SAE(architecture=architecture, **tensors, **more)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
