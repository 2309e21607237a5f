"""Persona vectors: one `.pt` dictionary per role or trait, each entry [layers, d].

Row l is the output of block l (there is no row of the embedding, other than in the bare [L+1, d] files).

- A role holds means of activations: `pos_0` .. `pos_3` (rollouts by grade) and `pos_all`. Its direction is
  `pos_3 - default_1`.
- A trait holds differences, `pos_neg`, `pos_neg_50`, `pos_default`, `pos_default_50`, and the means `pos_70` and
  `pos_40_70`. Its direction is `pos_neg_50`.

A mean is dominated by what all texts share and is no direction of the role or trait; it is returned only when it is
asked for as `raw`. `default_1` is an entry of `default_vectors.pt` of the same model, which lies beside the file or in
one of the two folders above it. A key that is missing is an error: nothing else is taken in its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.directions import _archive
from trimtab.directions.direction import Direction
from trimtab.errors import VectorError
from trimtab.sites import Site

DEFAULTS = "default_vectors.pt"
ROLE_MEANS = ("pos_0", "pos_1", "pos_2", "pos_3", "pos_all")
TRAIT_MEANS = ("pos_70", "pos_40_70")
TRAIT_DIFFERENCES = ("pos_neg", "pos_neg_50", "pos_default", "pos_default_50")
DEFAULT_MEANS = ("pos_1", "default_1", "all_1")
_ROLE_KEY, _TRAIT_KEY, _DEFAULT_KEY = "pos_3", "pos_neg_50", "default_1"
_LEVELS_UP = 3

Kind = Literal["role", "trait"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PersonaFile:
    """The entries of one persona file.

    Args:
        path: the file.
        kind: whether its keys are those of a role or of a trait.
        entries: key -> [layers, d], of any floating dtype; row l is the output of block l.
    """

    path: Path
    kind: Kind
    entries: Mapping[str, Tensor]

    @property
    def num_layers(self) -> int:
        """Rows of every entry."""
        return int(next(iter(self.entries.values())).shape[0])

    def direction(
        self,
        layer: int,
        *,
        key: str | None = None,
        raw: str | None = None,
        default: str | os.PathLike[str] | None = None,
    ) -> Direction:
        """Return the direction at one layer.

        Args:
            layer: 0-based block whose output the vector belongs to.
            key: another difference of a trait; None takes `pos_3 - default_1` of a role, `pos_neg_50` of a trait.
            raw: the key of any entry, taken as it is.
            default: file that holds `default_1`; None looks for `default_vectors.pt`. Roles only.

        Raises:
            VectorError: a key that does not exist (names those that do), a mean asked for as `key`, a layer outside the
                file, no file of defaults, or one of another shape.
        """
        if key is not None and raw is not None:
            raise VectorError(f"{self.path}: key={key!r} and raw={raw!r} were given; give one of them")
        if not 0 <= layer < self.num_layers:
            raise VectorError(f"{self.path} has layers 0 to {self.num_layers - 1}; layer {layer} was asked for")
        if raw is not None:
            return self._made(self._entry(raw)[layer].double(), layer, f"raw:{raw}")
        if self.kind == "trait":
            chosen = key or _TRAIT_KEY
            entry = self._entry(chosen)
            if chosen not in TRAIT_DIFFERENCES:
                raise VectorError(self._is_a_mean(chosen, f"no key for {_TRAIT_KEY}"))
            return self._made(entry[layer].double(), layer, chosen)
        if key is not None:
            self._entry(key)
            raise VectorError(self._is_a_mean(key, f"no key for {_ROLE_KEY} - {_DEFAULT_KEY}"))
        entry = self._entry(_ROLE_KEY)
        file = _default_file(self.path) if default is None else Path(default)
        defaults = _entries(_archive.load(file), file)
        other = _get(defaults, _DEFAULT_KEY, file)
        if other.shape != entry.shape:
            raise VectorError(
                f"{file}[{_DEFAULT_KEY}] has shape {list(other.shape)} and {self.path}[{_ROLE_KEY}] "
                f"{list(entry.shape)}; take the defaults of the same model"
            )
        return self._made(entry[layer].double() - other[layer].double(), layer, f"{_ROLE_KEY} - {file}[{_DEFAULT_KEY}]")

    def _entry(self, key: str) -> Tensor:
        return _get(self.entries, key, self.path)

    def _is_a_mean(self, key: str, instead: str) -> str:
        return f"{self.path}[{key}] is a mean of activations, not a difference; ask for raw:{key}, or give {instead}"

    def _made(self, vector: Tensor, layer: int, what: str) -> Direction:
        source = f"{self.path}[{what}]"
        bad = int((~torch.isfinite(vector)).sum())
        if bad or not bool(vector.any()):
            why = f"{bad} of its {vector.numel()} values are not finite" if bad else f"it is zero at layer {layer}"
            raise VectorError(f"{source} is not a direction: {why}")
        narrow = vector.to(torch.float32)
        return Direction(
            vector=narrow,
            norm=float(narrow.double().norm()),
            source=source,
            layer=layer,
            site=Site("resid_post", layer),
        )


def read_persona(path: str | os.PathLike[str]) -> PersonaFile:
    """Read the file of one role or trait.

    Raises:
        VectorError: not a readable torch file, no entry of a role or trait (names the keys), keys of both, or entries
            that are not [layers, d] of one shape.
    """
    file = Path(path)
    return of_mapping(_archive.load(file), file)


def of_mapping(value: Any, path: Path) -> PersonaFile:
    """Return what a loaded persona file holds; raises as `read_persona`."""
    entries = _entries(value, path)
    named = ", ".join(entries)
    role = [key for key in entries if key in ROLE_MEANS]
    trait = [key for key in entries if key in TRAIT_MEANS + TRAIT_DIFFERENCES]
    if bool(role) == bool(trait):
        why = f"{', '.join(role)} of a role and {', '.join(trait)} of a trait" if role else "no key of a role or trait"
        raise VectorError(f"{path} has {why}; keys: {named or 'none'}")
    return PersonaFile(path=path, kind="role" if role else "trait", entries=entries)


def is_persona(value: Mapping[Any, Any]) -> bool:
    """Return whether every key of a loaded file is one of a role or of a trait."""
    inner = value.get("activations", value)
    names = set(inner) if isinstance(inner, Mapping) else set()
    return bool(names) and (names <= set(ROLE_MEANS) or names <= {*TRAIT_MEANS, *TRAIT_DIFFERENCES})


def _entries(value: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; those of a file with metadata are under "activations"."""
    inner = value.get("activations", value) if isinstance(value, Mapping) else value
    if not isinstance(inner, Mapping) or not inner:
        raise VectorError(f"{path} holds a {type(inner).__name__}; a dictionary of tensors was expected")
    entries: dict[str, Tensor] = {}
    for key, one in inner.items():
        if not isinstance(one, Tensor) or not one.is_floating_point() or one.ndim != 2 or not one.numel():
            what = f"{one.dtype} {list(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
            raise VectorError(f"{path}[{key}] is {what}; floating point numbers of shape [layers, d] were expected")
        entries[str(key)] = _archive.check_storage(one, f"{path}[{key}]")
    shapes = {key: list(one.shape) for key, one in entries.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise VectorError(f"{path} holds entries of different shapes: {shapes}")
    return entries


def _get(entries: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    if key not in entries:
        raise VectorError(f"{path} has no {key!r}; keys: {', '.join(entries)}")
    return entries[key]


def _default_file(path: Path) -> Path:
    folders = path.resolve().parents[:_LEVELS_UP]
    found = [folder / DEFAULTS for folder in folders if (folder / DEFAULTS).is_file()]
    if not found:
        raise VectorError(
            f"{path} is a role: {_ROLE_KEY} - {_DEFAULT_KEY} needs {DEFAULTS}, which is not in "
            f"{', '.join(map(str, folders))}; give its path, or ask for raw:{_ROLE_KEY}"
        )
    return found[0]
