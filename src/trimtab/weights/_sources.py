"""Read sets of directions from vector files, persona folders, principal components and decoder rows.

| Given | Read as |
|---|---|
| `FOLDER` of persona files (at any depth) | one role or trait a file, by its keys |
| `FILE.pt` of a role or trait | that role or trait |
| `PCA.pt`, `PCA.pt#PC1-PC8` | principal components, in activation space |
| `SAE#3,17,20-25` | decoder rows of those latents of an autoencoder (a file of weights, or its folder) |
| `FOLDER` of .safetensors vectors, one vector file, `testbed:NAME`, `random:SEED` | vectors |

`NAME=` before one direction calls it so; `role:`, `trait:`, `vector:`, `pc:` and `latent:` before it say its kind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab._base.progress import progress
from trimtab.directions import load_direction
from trimtab.directions._archive import load as load_archive
from trimtab.directions.direction import Direction
from trimtab.directions.pca_file import is_pca_file, read_pca
from trimtab.directions.persona import DEFAULTS, is_persona, of_mapping
from trimtab.directions.sae_file import is_sae_file
from trimtab.errors import InputError, VectorError
from trimtab.steering import SteeringVector
from trimtab.weights.directions import KINDS, DirectionSet, Kind, join, natural_key, rename

Given = str | os.PathLike[str] | DirectionSet | Mapping[str, Tensor] | SteeringVector


def read_directions(
    given: Given | Sequence[Given], *, hidden_size: int | None = None, layer: int | None = None
) -> DirectionSet:
    """Read directions into one set; nothing is merged and nothing is left out.

    Args:
        given: texts as in the table above, sets, vectors, or name -> vector mappings; one or several.
        hidden_size: width that the model has; needed by `random:SEED`, checked for all.
        layer: 0-based block to take from files that hold a vector for each.

    Raises:
        InputError: nothing given, two directions of one kind and name, or latents without numbers.
        VectorError: no such file, not a direction, another width (both numbers), or directions of different layers.

    Example:
        >>> read_directions(["personas/qwen3", "layer22_pos3.pt#PC1-PC8"], layer=22)
    """
    single = isinstance(given, (str, os.PathLike, DirectionSet, Mapping, SteeringVector))
    listed: list[Any] = [given] if single else list(given)  # type: ignore[arg-type]
    found = join([_read(one, hidden_size, layer) for one in listed])
    if hidden_size is not None and found.hidden_size != hidden_size:
        one = found.about[0]
        raise VectorError(
            f"{one.source}: {one.label} has width {found.hidden_size} and the model has hidden size {hidden_size}; "
            "use directions made for this model"
        )
    return found


def _read(given: Any, hidden_size: int | None, layer: int | None) -> DirectionSet:
    if isinstance(given, DirectionSet):
        return given
    if isinstance(given, SteeringVector):
        site = given.site
        return DirectionSet.of({"vector": given.vector}, layer=None if site is None else site.layer)
    if isinstance(given, Mapping):
        return DirectionSet.of(dict(given))
    kind, name, path, keys = _split(os.fspath(given))
    found = _file(path, keys, hidden_size, layer)
    if kind is not None:
        found = replace(found, about=tuple(replace(one, kind=kind) for one in found.about))
    return found if name is None else rename(found, name)


def _split(text: str) -> tuple[Kind | None, str | None, str, str]:
    """Take `KIND:NAME=PATH#KEYS` apart; a path may hold any of the three characters when such a file exists."""
    if Path(text).exists():
        return None, None, text, ""
    head, colon, rest = text.partition(":")
    kind: Kind | None = None
    if colon and head in KINDS and head != "control":
        kind, text = head, rest
    name, equals, rest = text.partition("=")
    called = name if equals and "/" not in name and not Path(text).exists() else None
    text = rest if called else text
    path, _, keys = (text, "", "") if Path(text).exists() else text.partition("#")
    return kind, called, path, keys


def _file(text: str, keys: str, hidden_size: int | None, layer: int | None) -> DirectionSet:
    path = Path(text)
    if is_sae_file(path):
        return _latents(path, keys)
    if path.is_dir():
        return _folder(path, layer)
    if path.suffix in (".pt", ".pth") and path.is_file() and is_pca_file(path):
        return _components(path, keys)
    if path.suffix in (".pt", ".pth") and path.is_file():
        value = load_archive(path)
        if isinstance(value, Mapping) and is_persona(value):
            return _persona(path, value, layer, path.stem)
    return _vector(text, path.stem, keys or None, hidden_size, layer)


def _vector(text: str, stem: str, key: str | None, hidden_size: int | None, layer: int | None) -> DirectionSet:
    wanted = None if text.startswith(("testbed:", "random:")) else layer
    read = load_direction(text, layer=wanted, hidden_size=hidden_size, key=key)
    name = text.rpartition(":")[2] if text.startswith("testbed:") else text if text.startswith("random:") else stem
    return _made(read, name, "vector")


def _made(read: Direction, name: str, kind: Kind) -> DirectionSet:
    return DirectionSet.of({name: read.vector}, kind=kind, source=read.source, layer=read.layer)


def _persona(path: Path, value: Mapping[Any, Any], layer: int | None, name: str) -> DirectionSet:
    file = of_mapping(value, path)
    if layer is None:
        raise VectorError(
            f"{path} holds a vector for each of layers 0 to {file.num_layers - 1}; say whose to take (vector_layer)"
        )
    return _made(file.direction(layer), name, file.kind)


def _folder(path: Path, layer: int | None) -> DirectionSet:
    """Read every persona, PCA and vector file of a folder, in natural order."""
    files = sorted(
        (one for one in path.rglob("*") if one.suffix in (".pt", ".safetensors") and one.name != DEFAULTS),
        key=lambda one: natural_key(one.as_posix()),
    )
    files = [one for one in files if "controls" not in one.relative_to(path).parts]
    if (path / "steering_vector.pt").is_file() or (path / "extraction.json").is_file():
        return _vector(str(path), path.name, None, None, layer)
    if not files:
        raise VectorError(f"{path} holds no vector; a folder of persona files (.pt) or vectors was expected")
    found = []
    with progress(f"reading {path.name}", len(files)) as bar:
        for file in files:
            found.append(_file(str(file), "", None, layer))
            bar.advance()
    return join(_told_apart(found, files, path))


def _told_apart(found: list[DirectionSet], files: list[Path], folder: Path) -> list[DirectionSet]:
    """Two files of one kind and stem are called by their place in the folder."""
    labels = [one.labels[0] for one in found]
    return [
        rename(one, file.relative_to(folder).with_suffix("").as_posix())
        if len(one) == 1 and labels.count(one.labels[0]) > 1
        else one
        for one, file in zip(found, files, strict=True)
    ]


def _components(path: Path, keys: str) -> DirectionSet:
    file = read_pca(path)
    count = len(file.components)
    numbers = _numbers(keys.replace("PC", ""), path) if keys else list(range(1, count + 1))
    rows = [(f"PC{number}", file.direction(number).vector.double()) for number in numbers]
    made = DirectionSet.of(rows, kind="pc", source=str(path), layer=file.layer)
    about = tuple(
        replace(one, number=number, variance=float(file.variance_ratio[number - 1]))
        for one, number in zip(made.about, numbers, strict=True)
    )
    return replace(made, about=about)


def _latents(path: Path, keys: str) -> DirectionSet:
    """Read decoder rows, each alone: a large decoder is not loaded."""
    if not keys:
        raise InputError(f"{path} is an autoencoder; name latents, as {path}#3,17,20-25")
    numbers = _numbers(keys, path)
    read = [load_direction(path, key=f"latent:{number}") for number in numbers]
    rows = [(str(number), one.vector) for number, one in zip(numbers, read, strict=True)]
    found = DirectionSet.of(rows, kind="latent", source=str(path), layer=read[0].layer)
    about = tuple(replace(one, number=number) for one, number in zip(found.about, numbers, strict=True))
    return replace(found, about=about)


def _numbers(keys: str, path: Path) -> list[int]:
    """Read `3,17,20-25`; both ends of a range count."""
    numbers: list[int] = []
    for part in keys.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise InputError(f"{path}#{keys}: {part!r} is no number or range; write 3,17,20-25")
        numbers += range(int(low), int(high or low) + 1)
    if not numbers:
        raise InputError(f"{path}#{keys}: the range is empty; write 3,17,20-25")
    return list(dict.fromkeys(numbers))
