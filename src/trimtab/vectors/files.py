"""Vector files: random controls, conversion between formats, and what a file holds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from trimtab._base import jsonio
from trimtab.directions import load_direction, permuted_control, random_control, write_gguf
from trimtab.directions.direction import Direction
from trimtab.errors import InputError
from trimtab.results.vectors_clean import VectorListing
from trimtab.sites import Site
from trimtab.steering import SteeringVector

Given = str | os.PathLike[str]
_FORMS = (".safetensors", ".npy", ".pt", ".gguf")


def random(
    like: Given, *, out: Given, seed: int = 0, orthogonal: bool = False, permuted: bool = False
) -> VectorListing:
    """Write a control of a vector: another direction of the same norm at the same site.

    Args:
        like: the vector to match.
        out: file to write (.safetensors, .npy or .pt).
        seed: names the control for good.
        orthogonal: without any component along the vector.
        permuted: the vector's own elements in another order, instead of a random direction.

    Raises:
        InputError: both orthogonal and permuted.
    """
    if orthogonal and permuted:
        raise InputError("a control is orthogonal or permuted, not both")
    source = load_direction(like)
    made = permuted_control(source, seed=seed) if permuted else random_control(source, seed=seed, orthogonal=orthogonal)
    kind = "permuted" if permuted else "orthogonal" if orthogonal else "random"
    recipe = {"method": kind, "seed": seed, "like": os.fspath(like)}
    vector = SteeringVector.of(made.vector, site=made.site, recipe=recipe, median_norm=source.median_norm)
    return _write(vector, Path(out))


def convert(
    source: Given,
    out: Given,
    *,
    layer: int | None = None,
    key: str | None = None,
    site: str | None = None,
    model_hint: str = "",
) -> VectorListing:
    """Write a vector in another format.

    Args:
        source: any file that `load_direction` reads.
        out: .safetensors (ours, with everything that is known of the vector), .npy or .pt (the bare vector), or .gguf.
        layer: layer to take from a file of several.
        key: entry to take from a file of several.
        site: where the vector acts, when the file does not say.
        model_hint: llama.cpp's name of the model's architecture, such as "qwen3"; for .gguf.

    Raises:
        InputError: another ending, a site other than the file's, or a .gguf of a vector without a layer.
    """
    read = load_direction(source, layer=layer, key=key)
    vector = _vector(read)
    if site is not None:
        wanted = Site.parse(site)
        if vector.site not in (None, wanted):
            raise InputError(f"{read.source} was made at {vector.site}; {wanted} was asked for")
        vector = replace(vector, site=wanted)
    return _write(vector, Path(out), model_hint)


def show(path: Given, *, layer: int | None = None, key: str | None = None) -> VectorListing:
    """Say what a vector file holds.

    Args:
        path: any file that `load_direction` reads.
        layer: layer to look at, in a file of several.
        key: entry to look at, in a file of several.
    """
    return _listing(_vector(load_direction(path, layer=layer, key=key)), os.fspath(path))


def _vector(read: Direction) -> SteeringVector:
    if read.calibrated is not None:
        return read.calibrated
    return SteeringVector.of(read.vector, site=read.site, provenance={"source": read.source})


def _write(vector: SteeringVector, path: Path, model_hint: str = "") -> VectorListing:
    if path.suffix not in _FORMS:
        raise InputError(f"{str(path)!r} ends in {path.suffix!r}; {', '.join(_FORMS)} was expected")
    if path.exists():
        raise InputError(f"{path} exists already; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        vector.save(path)
    elif path.suffix == ".gguf":
        layer = None if vector.site is None or vector.site.point != "resid_post" else vector.site.layer
        if layer is None:
            raise InputError(f"a .gguf vector acts at the output of a layer, and this one is made at {vector.site}")
        if not model_hint:
            raise InputError("a .gguf vector names its architecture; give model_hint, such as qwen3")
        write_gguf(path, {layer: vector.vector}, model_hint=model_hint)
    elif path.suffix == ".pt":
        import torch

        torch.save(vector.vector, path)
    else:
        import numpy as np

        np.save(path, vector.vector.numpy(), allow_pickle=False)
    return _listing(vector, str(path))


def _listing(vector: SteeringVector, path: str) -> VectorListing:
    def texts(about: object) -> tuple[tuple[str, str], ...]:
        assert isinstance(about, dict)
        return tuple((str(k), v if isinstance(v, str) else jsonio.dumps(v)) for k, v in sorted(about.items()))

    return VectorListing(
        path=path,
        form=Path(path).suffix.removeprefix(".") or path.partition(":")[0],
        site="" if vector.site is None else str(vector.site),
        width=len(vector.direction),
        norm=vector.norm,
        largest=float(vector.vector.abs().max()),
        median_norm=vector.median_norm,
        digest=vector.digest,
        model_digest=vector.model_digest,
        data_hash=vector.data_hash,
        quantiles=tuple(vector.quantiles.items()),
        recipe=texts(vector.recipe),
        provenance=texts(vector.provenance),
    )
