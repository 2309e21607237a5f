"""PCA files of persona work: principal components of role and trait vectors, with the scaler that came before.

    {"layer": int, "pca": sklearn PCA, "scaler": sklearn StandardScaler, "roles" | "traits": {type: [names]},
     "vectors": {type: [tensor]}, "pca_transformed", "variance_explained", "n_components"}

They are pickles. They are read with `torch.load(weights_only=True)`, which runs no code of the file, and within
`safe_globals` of exactly PCA, StandardScaler and numpy's constructors of arrays of numbers; a file that names anything
else is refused with that name. Only arrays are taken from the two objects; none of their methods is called.

The components live in standardised coordinates `(v - mean) / scale`. A step along component c there is a step along
`c * scale` in activation space: that is the direction, and not c itself.
"""

from __future__ import annotations

import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.directions import _archive
from trimtab.directions.direction import Direction
from trimtab.errors import PrerequisiteError, VectorError
from trimtab.sites import Site

_PCA = "sklearn.decomposition._pca.PCA"
_SCALER = "sklearn.preprocessing._data.StandardScaler"
_NUMBERS = ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")


@dataclass(frozen=True, kw_only=True, eq=False)
class PCAFile:
    """Principal components at one layer.

    Args:
        path: the file.
        layer: 0-based block whose output they belong to.
        components: [k, d] float64, orthonormal, in standardised coordinates.
        center: [d] float64, the mean that PCA took off after scaling.
        mean: [d] float64, the mean that the scaler took off; zeros when it took none.
        scale: [d] float64, what the scaler divided by; ones when it did not.
        variance_ratio: [k] float64, share of the variance of each component.
        names: labels of the vectors that it was fitted to, by type.
    """

    path: Path
    layer: int
    components: Tensor
    center: Tensor
    mean: Tensor
    scale: Tensor
    variance_ratio: Tensor
    names: Mapping[str, tuple[str, ...]]

    def direction(self, number: int) -> Direction:
        """Return component `number`, counted from 1, mapped back through the scaler; its sign is arbitrary.

        Raises:
            VectorError: there is no such component.
        """
        count = self.components.shape[0]
        if not 1 <= number <= count:
            raise VectorError(f"{self.path} has PC1 to PC{count}; PC{number} was asked for")
        vector = (self.components[number - 1] * self.scale).to(torch.float32)
        return Direction(
            vector=vector,
            norm=float(vector.double().norm()),
            source=f"{self.path}[PC{number}]",
            layer=self.layer,
            site=Site("resid_post", self.layer),
        )

    def project(self, vectors: Tensor) -> Tensor:
        """Return the coordinates of activations [n, d] on the components: [n, k] float64."""
        coordinates: Tensor = ((vectors.double() - self.mean) / self.scale - self.center) @ self.components.T
        return coordinates


def is_pca_file(path: Path) -> bool:
    """Return whether a torch archive names sklearn's PCA; nothing is loaded.

    Raises:
        VectorError: an archive that would unpack to more than it has.
    """
    _archive.check_archive(path)
    return _PCA in _globals(path)


def read_pca(path: str | os.PathLike[str]) -> PCAFile:
    """Read a PCA file.

    Raises:
        VectorError: not such a file, one that names other Python objects (names them), or arrays that do not fit.
        PrerequisiteError: scikit-learn is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise VectorError(f"{file}: no such file")
    _archive.check_archive(file)
    value = _load(file)
    if not isinstance(value, Mapping):
        raise VectorError(
            f"{file} holds a {type(value).__name__}; a dictionary with layer, pca and scaler was expected"
        )
    missing = [key for key in ("layer", "pca", "scaler") if key not in value]
    if missing:
        raise VectorError(f"{file} has no {', '.join(missing)}; keys: {', '.join(map(str, value)) or 'none'}")
    layer = value["layer"]
    if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or layer < 0:
        raise VectorError(f"{file}: layer {layer!r} is not a 0-based layer")
    for key, name in (("pca", _PCA), ("scaler", _SCALER)):
        kind = type(value[key])
        if f"{kind.__module__}.{kind.__qualname__}" != name:
            raise VectorError(f"{file}[{key}] is a {kind.__qualname__}; {name.rpartition('.')[2]} was expected")
    pca, scaler = vars(value["pca"]), vars(value["scaler"])
    components = _array(pca, "components_", file, ndim=2)
    width = components.shape[1]
    labels = value.get("roles") or value.get("traits") or {}
    return PCAFile(
        path=file,
        layer=int(layer),
        components=components,
        center=_array(pca, "mean_", file, size=width),
        mean=_array(scaler, "mean_", file, size=width) if scaler.get("with_mean") else torch.zeros(width).double(),
        scale=_scale(scaler, file, width),
        variance_ratio=_array(pca, "explained_variance_ratio_", file, size=components.shape[0]),
        names={str(kind): tuple(map(str, found)) for kind, found in dict(labels).items()},
    )


def _load(file: Path) -> Any:
    allowed = _allowed()
    known = {name for _, name in allowed}
    unknown = sorted(_globals(file) - known - _torch_names())
    if unknown:
        raise VectorError(
            f"{file} names {', '.join(unknown)}, which a PCA file does not need and which could run code; it is not "
            "loaded: a PCA file holds sklearn's PCA and StandardScaler, arrays of numbers and plain tensors"
        )
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sklearn, that another version wrote it: only arrays are taken
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error)
        refused = re.search(r"GLOBAL (\S+)|unrecognized function (.+)|but got (.+)", reason)
        what = next((one for one in refused.groups() if one), "") if refused else ""
        first = (reason.strip().splitlines() or [type(error).__name__])[0]
        raise VectorError(f"{file} is not loaded: {'it needs ' + what if what else first}") from error


def _allowed() -> tuple[tuple[Any, str], ...]:
    """Return exactly what a PCA file may name, under the names that numpy 1 and numpy 2 gave it."""
    try:
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise PrerequisiteError("PCA files need scikit-learn: pip install 'trimtab[classify]'") from error
    from numpy._core import multiarray

    names: list[tuple[Any, str]] = [(PCA, _PCA), (StandardScaler, _SCALER)]
    names += [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        names += [(getattr(multiarray, one), f"{module}.{one}") for one in ("_reconstruct", "scalar")]
    kinds = {type(np.dtype(one)) for one in _NUMBERS}
    return tuple(names) + tuple((kind, f"numpy.dtypes.{kind.__name__}") for kind in kinds)


def _torch_names() -> set[str]:
    """What torch itself allows in any file of tensors."""
    from torch._weights_only_unpickler import _get_allowed_globals

    return set(_get_allowed_globals())


def _globals(path: Path) -> set[str]:
    """Return every name that the pickle of a torch archive asks for, read off its opcodes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((one for one in archive.namelist() if one.endswith("data.pkl")), None)
            data = b"" if entry is None else archive.read(entry)
        found: set[str] = set()
        texts: list[str] = []
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
        return {name.replace("__builtin__.", "builtins.") for name in found}
    except Exception:  # not an archive, or not a pickle: the loader says so
        return set()


def _scale(scaler: Mapping[str, Any], file: Path, width: int) -> Tensor:
    if not scaler.get("with_std"):
        return torch.ones(width, dtype=torch.float64)
    scale = _array(scaler, "scale_", file, size=width)
    if not bool((scale > 0).all()):
        raise VectorError(f"{file}: the scaler divides by a number that is not above 0")
    return scale


def _array(holder: Mapping[str, Any], name: str, file: Path, *, size: int = 0, ndim: int = 1) -> Tensor:
    value = holder.get(name)
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim != ndim or not value.size:
        what = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise VectorError(f"{file}: {name} is {what}; floating point numbers of {ndim} dimensions were expected")
    if value.nbytes > file.stat().st_size or (size and value.shape != (size,)):
        raise VectorError(
            f"{file}: {name} has shape {list(value.shape)}; {size or 'no more than the file holds'} was expected"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64))
    if not bool(torch.isfinite(tensor).all()):
        raise VectorError(f"{file}: {name} holds values that are not finite")
    return tensor
