"""Capping configurations of the assistant-axis line of work: one `.pt` with vectors and experiments.

    {"vectors": {name: {"vector": [d], "layer": int}},
     "experiments": [{"id": str, "interventions": [{"vector": name, "cap": float}]}]}

Each intervention is `h - max(<h, u> - cap, 0) u` at the output of the vector's layer, u the unit vector, which is
`Cap(u, max=cap)`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.directions import _archive
from trimtab.errors import SteeringError, VectorError
from trimtab.sites import Site, SitePattern
from trimtab.steering import BoundOp, Cap, Constant, Positions, Steering


@dataclass(frozen=True, kw_only=True, eq=False)
class CappingFile:
    """What a capping configuration holds."""

    steerings: Mapping[str, Steering]
    """Experiment id -> its caps; several at one layer run in the order of the file."""
    norms: Mapping[str, float]
    """Vector name -> the norm it had; the caps do not depend on it."""


def load_capping(path: str | os.PathLike[str]) -> CappingFile:
    """Read a capping configuration.

    Raises:
        VectorError: not a torch file, one that would run code, or a vector that is not a direction.
        SteeringError: a missing key (names those that exist), an unknown vector, or an experiment without a cap.
    """
    source = Path(path)
    value = _archive.load(source)
    vectors = _get(value, "vectors", str(source))
    experiments = _get(value, "experiments", str(source))
    if not isinstance(vectors, Mapping) or not isinstance(experiments, (list, tuple)) or not experiments:
        raise SteeringError(f"{source}: expected a mapping of vectors and a list of experiments")
    norms, steerings = {}, {}
    for name, entry in vectors.items():
        tensor = _get(entry, "vector", f"{source}: vectors[{name!r}]")
        if not isinstance(tensor, Tensor):
            raise VectorError(f"{source}: vectors[{name!r}] holds a {type(tensor).__name__}; a tensor was expected")
        norms[str(name)] = float(_archive.check_storage(tensor, f"{source}: vectors[{name!r}]").double().norm())
    for index, entry in enumerate(experiments):
        where = f"{source}: experiments[{index}]"
        label = str(_get(entry, "id", where))
        if label in steerings:
            raise SteeringError(f"{where}: the id {label!r} is used twice")
        steerings[label] = _experiment(entry, vectors, where)
    return CappingFile(steerings=steerings, norms=norms)


def _experiment(entry: Any, vectors: Mapping[Any, Any], where: str) -> Steering:
    bound = []
    for number, one in enumerate(_get(entry, "interventions", where)):
        place = f"{where}.interventions[{number}]"
        vector = _get(vectors, _get(one, "vector", place), f"{place}: vectors")
        layer = _get(vector, "layer", f"{place}: its vector")
        cap = _get(one, "cap", place)
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise SteeringError(f"{place}: layer {layer!r} is not a 0-based layer")
        if isinstance(cap, Tensor) and cap.numel() == 1:
            cap = cap.item()
        try:
            op = Cap(_get(vector, "vector", place), max=cap)
        except (VectorError, SteeringError) as error:
            raise type(error)(f"{place}: {error}") from error
        pattern = SitePattern.parse(Site("resid_post", layer))
        bound.append(BoundOp(pattern, op, Positions.parse("all"), Constant(1.0)))
    if not bound:
        raise SteeringError(f"{where}: no intervention")
    return Steering.of(bound)


def _get(value: Any, key: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise SteeringError(f"{where}: expected a mapping with {key!r}, found a {type(value).__name__}")
    if key not in value:
        raise SteeringError(f"{where}: no {key!r}; keys: {', '.join(map(str, value)) or 'none'}")
    return value[key]
