"""SteeringVector: a direction with its norm and everything that says what it is good for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from trimtab._base import jsonio
from trimtab.errors import SteeringError, TrimtabError, VectorError
from trimtab.sites import Site
from trimtab.steering import _files
from trimtab.steering._canonical import tensor_digest
from trimtab.steering._vectors import VectorLike, as_tensor, nonzero, number, unit

FORMAT = "trimtab-vector"
VERSION = 1  # 1: first version


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringVector:
    """A unit direction, the norm its vector had, and its calibration.

    Args:
        direction: [d]; normalised here to float32.
        norm: norm of the vector in hidden units; `vector` is `norm * direction`.
        site: where it was made and acts; None when unknown. A layer is 0-based and `resid_post` is the block's output.
        recipe: how it was made: method, contrast, token selection, seed.
        model_digest: digest of the weights it was made on.
        data_hash: digest of the texts it was made from.
        quantiles: fraction -> quantile of the projections <h, direction> over the calibration rows.
        median_norm: median |h| over the calibration rows; the unit of strength "median_norm".
        provenance: versions, seed, command line, model id.

    Raises:
        VectorError: the direction is not finite, zero, or not one-dimensional, or the norm is not above 0.
    """

    direction: VectorLike
    norm: float
    site: Site | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    model_digest: str = ""
    data_hash: str = ""
    quantiles: Mapping[float, float] = field(default_factory=dict)
    median_norm: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        length = number(self.norm, "SteeringVector norm")
        if length <= 0:
            raise VectorError(
                f"SteeringVector norm={length:g}: a norm is above 0; give a vector its sign by its direction"
            )
        median = None if self.median_norm is None else number(self.median_norm, "SteeringVector median_norm")
        values = {
            "direction": unit(self.direction, "SteeringVector direction"),
            "norm": length,
            "site": None if self.site is None else Site.parse(self.site),
            "quantiles": {float(q): float(value) for q, value in sorted(self.quantiles.items())},
            "median_norm": median,
            "recipe": dict(self.recipe),
            "provenance": dict(self.provenance),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, vector: VectorLike, **about: Any) -> SteeringVector:
        """Split a vector into its direction and norm.

        Args:
            vector: [d], in hidden units.
            about: the other fields.
        """
        raw = nonzero(as_tensor(vector, "SteeringVector"), "SteeringVector").double()
        length = float(raw.norm())
        return cls(direction=(raw / length).float(), norm=length, **about)

    @property
    def vector(self) -> Tensor:
        """`norm * direction`, float32 [d], in hidden units."""
        scaled: Tensor = self.direction.double() * self.norm
        return scaled.to(torch.float32)

    @property
    def digest(self) -> str:
        """BLAKE2b-256 of the direction's little-endian float32 bytes, in hex."""
        return tensor_digest(self.direction)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        rest = [one.name for one in fields(self) if one.name != "direction"]
        same = all(getattr(self, name) == getattr(other, name) for name in rest)
        return same and torch.equal(self.direction, other.direction)

    def __hash__(self) -> int:
        return hash((self.digest, self.norm, self.site))

    def quantile(self, fraction: float) -> float:
        """Return a stored quantile of the projections, for instance as the bound of a Cap.

        Raises:
            VectorError: it was not stored; names those that were.
        """
        if fraction not in self.quantiles:
            stored = ", ".join(f"{q:g}" for q in self.quantiles) or "none"
            raise VectorError(f"no quantile {fraction:g} was calibrated for this vector; stored: {stored}")
        return self.quantiles[fraction]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the direction, and the other fields as JSON metadata.

        Raises:
            SteeringError: the file cannot be written.
        """
        about = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "direction"}
        about["site"] = None if self.site is None else str(self.site)
        about["quantiles"] = [[q, value] for q, value in self.quantiles.items()]
        text = jsonio.dumps(dict(sorted(about.items())))
        metadata = {"format": FORMAT, "version": str(VERSION), "vector": text, "digest": self.digest}
        _files.write(path, {"direction": self.direction}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringVector:
        """Read what `save` wrote.

        Raises:
            SteeringError: not such a file, a newer version, unknown keys, or bytes that do not match the digest.
        """
        tensors, metadata = _files.read(path, FORMAT, VERSION)
        _files.require_keys(metadata, {"format", "version", "vector", "digest"}, str(path))
        _files.require_keys(tensors, {"direction"}, str(path))
        if tensor_digest(tensors["direction"]) != metadata["digest"]:
            raise SteeringError(f"{path} is corrupt: its direction does not match its digest {metadata['digest'][:16]}")
        about = jsonio.loads(metadata["vector"])
        known = {one.name for one in fields(cls)} - {"direction"}
        try:
            _files.require_keys(about, known, str(path))
            return cls(**{**about, "direction": tensors["direction"], "quantiles": dict(about["quantiles"])})
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, TrimtabError):
                raise
            raise SteeringError(f"{path}: its metadata is not that of a vector: {error}") from error
