"""Read a direction from any of the inputs that commands and functions take.

| Input | Index law |
|---|---|
| our `.safetensors` (SteeringVector) | its site |
| bare `.pt` tensor or `.npy`, [d] | none: the caller says where |
| directory with `steering_vector.pt` + `steering_config.json` | `target_layer`: the output of that block |
| persona `.pt` (or `.npy`), [L+1, d] | index 0 is the embedding; layer l is index l+1 |
| persona `.pt` of one role or trait | row l is the output of block l; `persona` says which entry is taken |
| PCA `.pt` of personas, `key="PC1"` | its `layer`: the output of that block |
| GGUF control vector | `direction.N` is the output of block N |
| sparse autoencoder, `PATH:latent:17` or `key="latent:17"` | its site; the decoder's row, as long as the file has it |
| `random:SEED` | none; unit norm |
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trimtab import testbed
from trimtab._base import jsonio
from trimtab.directions import _archive, gguf_file, pca_file, persona, sae_file
from trimtab.directions.direction import Direction
from trimtab.errors import VectorError
from trimtab.sites import Site
from trimtab.steering import SteeringVector
from trimtab.steering.vector import FORMAT

_INPUTS = (
    "a .safetensors vector of ours, the directory of an extraction or a training, a .pt or .npy tensor, a directory "
    "with steering_vector.pt and steering_config.json, a .gguf control vector, an autoencoder's PATH:latent:N, "
    "testbed:NAME, or random:SEED"
)


def load_direction(
    spec: str | os.PathLike[str] | Tensor | SteeringVector | Direction,
    *,
    layer: int | None = None,
    hidden_size: int | None = None,
    key: str | None = None,
) -> Direction:
    """Read a direction.

    Args:
        spec: a path, `PATH:latent:N` of a sparse autoencoder, `random:SEED`, or a vector that is loaded already.
        layer: 0-based layer to take from a file that holds several.
        hidden_size: width that the model has: needed by `random:`, checked for the others.
        key: name of the tensor to take from a file that holds several by name; "raw:NAME" takes a mean of a persona
            file as it is, "PC1" a principal component, "latent:17" a decoder row of a sparse autoencoder.

    Raises:
        VectorError: no such file, not a vector, wrong width (both numbers), or a layer or key that the file does not
            have (names those that it has).

    Example:
        >>> load_direction("random:7", hidden_size=4).vector.shape
        torch.Size([4])
    """
    found = _load(spec, layer, hidden_size, key)
    if hidden_size is not None and found.vector.shape[0] != hidden_size:
        raise VectorError(
            f"{found.source}: the vector has width {found.vector.shape[0]} and the model has hidden size "
            f"{hidden_size}; use a vector made for this model"
        )
    if found.layer is not None and layer is not None and found.layer != layer:
        raise VectorError(f"{found.source} is a vector of layer {found.layer}; layer {layer} was asked for")
    return found


def _load(spec: Any, layer: int | None, hidden_size: int | None, key: str | None) -> Direction:
    if isinstance(spec, Direction):
        return spec
    if isinstance(spec, SteeringVector):
        return _of_vector(spec, "a SteeringVector")
    if isinstance(spec, Tensor):
        return _make(spec, "a tensor", layer, key)
    text = os.fspath(spec)
    if text.startswith("random:"):
        return _random(text, hidden_size)
    if text.startswith("testbed:"):
        return _testbed(text)
    before, mark, number = text.rpartition(":latent:")
    if mark and key is None:
        text, key = before, f"latent:{number}"
    path = Path(text)
    if sae_file.is_sae_file(path):
        return _latent(path, key)
    if path.is_dir():
        return _directory(path, layer, key)
    if not path.is_file():
        raise VectorError(f"{text}: no such file; a vector is {_INPUTS}")
    match path.suffix:
        case ".safetensors":
            return _safetensors(path, layer, key)
        case ".npy":
            return _make(_npy(path), str(path), layer, key)
        case ".gguf":
            return _gguf(path, layer)
        case ".pt" | ".pth" | ".bin":
            config = path.with_name("steering_config.json")
            if path.name == "steering_vector.pt" and config.is_file():
                return _trained(path, config)
            return _pca(path, key) if pca_file.is_pca_file(path) else _torch(path, layer, key)
    raise VectorError(f"{text}: unknown kind of file {path.suffix!r}; a vector is {_INPUTS}")


def _directory(path: Path, layer: int | None, key: str | None) -> Direction:
    """Read the directory of an extraction or a training, one vector file per site, or of a trained vector.

    Of several sites the one is taken that `key` or `layer` names, else the one that the extraction found best.
    """
    files = {one.stem: one for one in sorted(path.glob("*.safetensors")) if one.stem not in ("steering", "state")}
    if not files or (path / "steering_vector.pt").exists():
        return _trained(path / "steering_vector.pt", path / "steering_config.json")
    names = [key] if key is not None else list(files)
    if key is None and layer is not None:
        names = [name for name in files if name.startswith(f"layers.{layer}.")]
    if key is None and layer is None and len(files) > 1 and (path / "extraction.json").is_file():
        best = jsonio.loads((path / "extraction.json").read_text(encoding="utf-8")).get("best")
        names = names if best is None else [best]
    if len(names) != 1 or names[0] not in files:
        asked = f"{key!r} was asked for" if key else "no layer was given" if layer is None else f"layer {layer} was"
        raise VectorError(f"{path} holds vectors of {', '.join(files)}; {asked}")
    return _safetensors(files[names[0]], layer, None)


def _torch(path: Path, layer: int | None, key: str | None) -> Direction:
    value = _archive.load(path)
    if not isinstance(value, Mapping) or not persona.is_persona(value):
        return _make(value, str(path), layer, key)
    file = persona.of_mapping(value, path)
    if layer is None:
        raise VectorError(f"{path} has layers 0 to {file.num_layers - 1}; no layer was given")
    if key is not None and key.startswith("raw:"):
        return file.direction(layer, raw=key.removeprefix("raw:"))
    return file.direction(layer, key=key)


def _pca(path: Path, key: str | None) -> Direction:
    number = (key or "").removeprefix("PC")
    if key is None or not key.startswith("PC") or not number.isdecimal():
        asked = "no key was given" if key is None else f"{key!r} was asked for"
        raise VectorError(f"{path} holds principal components and {asked}; name one as PC1")
    return pca_file.read_pca(path).direction(int(number))


def _latent(path: Path, key: str | None) -> Direction:
    row, site, source = sae_file.read_row(path, key)
    return _make(row, source, None, None, site=Site.parse(site) if site else None)


def _make(value: Any, source: str, layer: int | None, key: str | None, *, site: Site | None = None) -> Direction:
    """Return the direction in a loaded value: a tensor [d] or [L+1, d], or a mapping of them."""
    if isinstance(value, Mapping):
        return _pick(value, source, layer, key)
    if not isinstance(value, Tensor):
        raise VectorError(f"{source} holds a {type(value).__name__}; a tensor was expected")
    tensor = _archive.check_storage(value, source)
    if tensor.ndim == 2 and 1 in tensor.shape:
        tensor = tensor.reshape(-1)
    if tensor.ndim == 2:
        layers = tensor.shape[0] - 1
        if layer is None or not 0 <= layer < layers:
            asked = "no layer was given" if layer is None else f"layer {layer} was asked for"
            raise VectorError(
                f"{source} holds {tensor.shape[0]} rows: the embedding, then the outputs of layers 0 to {layers - 1}; "
                f"{asked}"
            )
        tensor, site = tensor[layer + 1], Site("resid_post", layer)
    split = SteeringVector.of(_named(tensor, source))
    return Direction(
        vector=tensor.detach().to(torch.float32).clone(),
        norm=split.norm,
        source=source,
        layer=None if site is None else site.layer,
        site=site,
    )


def _named(tensor: Tensor, source: str) -> Tensor:
    if tensor.ndim != 1 or tensor.numel() == 0:
        raise VectorError(f"{source}: shape {list(tensor.shape)} was given; [d] or [layers + 1, d] was expected")
    bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
    if bad or not bool(tensor.any()):
        what = f"{bad} of its {tensor.numel()} values are not finite" if bad else f"it is zero (width {tensor.numel()})"
        raise VectorError(f"{source} is not a direction: {what}")
    return tensor


def _pick(value: Mapping[Any, Any], source: str, layer: int | None, key: str | None) -> Direction:
    names = [str(name) for name in value]
    if "vectors" in value and ("experiments" in value or "interventions" in value):
        raise VectorError(f"{source} is a capping configuration with experiments; read it with load_capping")
    if key is None and list(names) == ["steering_vector"]:
        key = "steering_vector"
    chosen = next((item for name, item in value.items() if str(name) == key), None)
    if key is None or chosen is None:
        asked = "no key was given" if key is None else f"there is no {key!r}"
        raise VectorError(f"{source} holds {len(names)} entries and {asked}; keys: {', '.join(names[:20]) or 'none'}")
    return _make(chosen, f"{source}[{key}]", layer, None)


def _of_vector(vector: SteeringVector, source: str) -> Direction:
    site = vector.site
    return Direction(
        vector=vector.vector,
        norm=vector.norm,
        source=source,
        layer=None if site is None else site.layer,
        site=site,
        calibrated=vector,
    )


def _testbed(text: str) -> Direction:
    ready = testbed.direction(text.removeprefix("testbed:"))
    site = Site.parse(ready.site)
    norm = float(ready.vector.double().norm())
    return Direction(vector=ready.vector, norm=norm, source=text, layer=site.layer, site=site)


def _random(text: str, hidden_size: int | None) -> Direction:
    seed = text.removeprefix("random:")
    if not seed.isdecimal() or int(seed) >= 2**32:
        raise VectorError(f"{text!r}: expected random:SEED with a seed from 0 to {2**32 - 1}, such as random:0")
    if hidden_size is None:
        raise VectorError(f"{text!r} needs a width; give hidden_size")
    # RandomState: numpy promises never to change its stream, so a seed names one direction for good
    drawn = np.random.RandomState(int(seed)).standard_normal(hidden_size)
    unit = torch.from_numpy(drawn / np.linalg.norm(drawn)).float()
    return Direction(vector=unit, norm=1.0, source=text)


def _npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
        return torch.from_numpy(np.array(array, dtype=np.float32))  # of its own: the map is read-only
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise VectorError(f"{path} is not an array of numbers: {error}") from error


def _safetensors(path: Path, layer: int | None, key: str | None) -> Direction:
    try:
        with safetensors.safe_open(str(path), framework="pt") as stream:
            kind = (stream.metadata() or {}).get("format", "")
            names = list(stream.keys())
            if kind == FORMAT:
                return _of_vector(SteeringVector.load(path), str(path))
            if kind == "trimtab-steering":
                raise VectorError(f"{path} is a whole Steering; read it with Steering.load")
            if key is None and len(names) == 1:
                key = names[0]
            if key in names:
                return _make(stream.get_tensor(key), f"{path}[{key}]", layer, None)
    except (safetensors.SafetensorError, OSError) as error:
        raise VectorError(f"{path} is not a readable safetensors file: {error}") from error
    return _pick(dict.fromkeys(names), str(path), layer, key)


def _trained(vector: Path, config: Path) -> Direction:
    if not vector.is_file() or not config.is_file():
        listed = ", ".join(sorted(one.name for one in vector.parent.iterdir())[:20]) or "nothing"
        raise VectorError(f"{vector.parent} needs steering_vector.pt and steering_config.json; it holds {listed}")
    try:
        about = json.loads(config.read_text())
        layer = about["target_layer"]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise VectorError(f"{config} is not JSON: {error}") from error
    except KeyError as error:
        raise VectorError(f"{config} has no target_layer; keys: {', '.join(sorted(about))}") from error
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        raise VectorError(f"{config}: target_layer {layer!r} is not a 0-based layer")
    value = _archive.load(vector)
    if isinstance(value, Mapping):
        if "steering_vector" not in value:
            raise VectorError(f"{vector} has no 'steering_vector'; keys: {', '.join(map(str, value))}")
        value = value["steering_vector"]
    return _make(value, str(vector), None, None, site=Site("resid_post", layer))


def _gguf(path: Path, layer: int | None) -> Direction:
    file = gguf_file.read_gguf(path)
    if layer is None and len(file.directions) == 1:
        layer = next(iter(file.directions))
    if layer is None or layer not in file.directions:
        asked = "no layer was given" if layer is None else f"layer {layer} was asked for"
        raise VectorError(f"{path} has directions for layers {', '.join(map(str, file.directions))}; {asked}")
    return _make(file.directions[layer], f"{path}[direction.{layer}]", None, None, site=Site("resid_post", layer))
