"""Decoder rows of sparse autoencoders as directions, read from their files one row at a time.

| Input | What it is |
|---|---|
| directory with `cfg.json` and `sae_weights.safetensors` | SAELens, and what this library saves |
| `params.npz` | Gemma Scope |
| `.safetensors` with `W_enc` and `W_dec` | weights alone |

Row i of `W_dec` [d_sae, d_out] is the direction of latent i.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from trimtab.errors import InputError, VectorError
from trimtab.sites import Site

CONFIG, WEIGHTS, PARAMETERS = "cfg.json", "sae_weights.safetensors", "params.npz"
_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "attn_z",
    "mlp.hook_post": "mlp_act",
}
_POINTS = {point: hook for hook, point in _HOOKS.items()}
_BLOCK = re.compile(r"blocks\.(\d+)\.([\w.]+)")
_LATENT = re.compile(r"latent:(\d+)")


def site_of_hook(hook: str) -> str:
    """Return our site of a TransformerLens hook name; a name that is one already is kept, an unknown one gives "".

    Example:
        >>> site_of_hook("blocks.12.hook_resid_post")
        'layers.12.resid_post'
    """
    found = _BLOCK.fullmatch(hook)
    if found and found[2] in _HOOKS:
        return f"layers.{found[1]}.{_HOOKS[found[2]]}"
    if hook == "hook_embed":
        return "embed"
    try:
        return str(Site.parse(hook))
    except InputError:
        return ""


def hook_of_site(site: str) -> str:
    """Return the TransformerLens hook name of our site; the site itself where that library has none."""
    read = Site.parse(site)
    if read.layer is not None and read.point in _POINTS:
        return f"blocks.{read.layer}.{_POINTS[read.point]}"
    return "hook_embed" if site == "embed" else site


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `cfg.json` of a directory.

    Raises:
        InputError: it is missing, or not a JSON object.
    """
    path = folder / CONFIG
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; an object was expected")
    return found


def sites_of_config(config: dict[str, Any]) -> tuple[str, str]:
    """Return (site, target site) that a `cfg.json` names; "" for what it does not."""
    about = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    assert isinstance(about, dict)
    pairs = (("site", "hook_name"), ("target_site", "hook_name_out"))
    names = [about.get(ours) or about.get(theirs) or config.get(theirs) or "" for ours, theirs in pairs]
    return site_of_hook(str(names[0])), site_of_hook(str(names[1]))


def read_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a `params.npz` as float32 tensors; nothing pickled is loaded.

    Raises:
        InputError: not such an archive.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            # float32 on purpose: published files hold float32 and bfloat16 has no numpy dtype
            return {
                ("W_" + name[2:] if name.startswith("w_") else name): torch.from_numpy(
                    np.ascontiguousarray(data[name], dtype=np.float32)
                )
                for name in data.files
            }
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} is not an archive of arrays: {error}") from error


def is_sae_file(path: Path) -> bool:
    """Whether a path holds an autoencoder: a directory of one, its archive, or safetensors with both weights."""
    if path.is_dir():
        return (path / WEIGHTS).is_file() or (path / PARAMETERS).is_file()
    if path.suffix not in (".npz", ".safetensors") or not path.is_file():
        return False
    if path.suffix == ".npz":
        return True
    try:
        with safetensors.safe_open(str(path), framework="pt") as stream:
            return {"W_enc", "W_dec"} <= set(stream.keys())
    except (safetensors.SafetensorError, OSError):
        return False


def read_row(path: Path, key: str | None) -> tuple[Tensor, str, str]:
    """Read one decoder row.

    Args:
        path: see the table above.
        key: "latent:17".

    Returns:
        (row, float32 [d_out]; its site, "" when unknown; where it came from).

    Raises:
        VectorError: no latent was named, or there is no such one.
        InputError: a file that cannot be read.
    """
    file, site = path, ""
    if path.is_dir():
        file = path / WEIGHTS if (path / WEIGHTS).is_file() else path / PARAMETERS
    if (file.parent / CONFIG).is_file() and file.name == WEIGHTS:
        own, target = sites_of_config(read_config(file.parent))
        site = target or own
    if file.suffix == ".npz":
        rows = read_npz(file).get("W_dec")
        if rows is None:
            raise VectorError(f"{file} holds no W_dec")
        return rows[_number(key, rows.shape[0], path)].clone(), site, f"{path}[{key}]"
    try:
        with safetensors.safe_open(str(file), framework="pt") as stream:
            part = stream.get_slice("W_dec")
            number = _number(key, part.get_shape()[0], path)
            row: Tensor = part[number : number + 1]
    except (safetensors.SafetensorError, OSError) as error:
        raise VectorError(f"{file} is not a readable safetensors file: {error}") from error
    return row[0].float(), site, f"{path}[{key}]"


def _number(key: str | None, count: int, path: Path) -> int:
    found = _LATENT.fullmatch(key or "")
    if found is None or int(found[1]) >= count:
        asked = "no key was given" if key is None else f"{key!r} was asked for"
        raise VectorError(f"{path} is an autoencoder with latents 0 to {count - 1} and {asked}; name one as latent:0")
    return int(found[1])
