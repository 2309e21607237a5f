"""A latent as something to steer with: its decoder row at the activations that it really reaches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab._base.progress import progress
from trimtab.directions import QUANTILES, calibrate
from trimtab.errors import InputError
from trimtab.results.sae_evaluation import ExportedLatent, SAEExport
from trimtab.sae._data import UNKNOWN_SITE, Data, opened
from trimtab.sae.files import load, save
from trimtab.sae.model import SAE
from trimtab.steering import Add, Positions, Steering, SteeringVector

VECTOR, STEERING = "vector.safetensors", "steering.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentVector:
    """One latent, calibrated on rows of its site.

    Args:
        latent: its number.
        vector: its decoder row, as long as its largest activation makes it: strength 1 is what the model itself
            reached. `recipe` says all of the below; `quantiles` are of the projections of the rows on it.
        largest: largest activation.
        density: share of the tokens on which it fires.
        active_quantiles: fraction -> activation, over the tokens on which it fires.
        tokens: rows it was calibrated on.
    """

    latent: int
    vector: SteeringVector
    largest: float
    density: float
    active_quantiles: dict[float, float]
    tokens: int

    def steering(self, scale: float = 1.0, *, positions: str | Positions = "all") -> Steering:
        """Return the steering that adds the latent at its site.

        Args:
            scale: parts of its largest activation; 1 adds what the model itself reached at most.
            positions: the rows.
        """
        return Steering({str(self.vector.site): Add(self.vector, scale)}, positions=positions)


def latent_vector(
    sae: SAE | str | os.PathLike[str],
    latent: int,
    data: Any = None,
    *,
    model: Any = "testbed",
    site: str | None = None,
    tokens: int = 20_000,
    max_length: int = 128,
    skip_texts: int = 0,
    backend: str = "hf",
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int = 8,
    allow_fallback: bool = False,
) -> LatentVector:
    """Make a steering vector of a latent, with the activations that it reaches on real text.

    Args:
        sae: an autoencoder, or what `load` reads.
        latent: its number.
        data: see `evaluate`, and so for the arguments below.
        model: what runs the texts.
        site: where activations are taken; None: the autoencoder's own.
        tokens: rows at most.
        max_length: texts are cut after this many tokens.
        skip_texts: texts to pass over first.
        backend: who runs the model.
        dtype: of the model.
        device: of the model and the autoencoder.
        batch_size: texts that run together.
        allow_fallback: run a model that is known by its structure only.

    Raises:
        InputError: no such latent, or one that never fires on these rows.
    """
    read = load(sae)
    if not 0 <= latent < read.d_sae:
        raise InputError(f"latent {latent} was asked for; there are 0 to {read.d_sae - 1}")
    where = site or read.site or UNKNOWN_SITE
    target = read.target_site or where
    options: dict[str, Any] = {"dtype": dtype, "device": device, "batch_size": batch_size}
    asked = Data(
        data=data,
        model=model,
        site=where,
        target=target,
        tokens=tokens,
        max_length=max_length,
        skip_texts=skip_texts,
        backend=backend,
        options=options | ({"allow_fallback": True} if allow_fallback else {}),
    )
    found: list[Tensor] = []
    row = read.W_dec[latent].detach().cpu()
    with opened(asked) as (rows, running), progress("activations") as bar, torch.no_grad():
        moved = read.to(device=device or ("cpu" if running is None else running.info.device))

        def states() -> Iterator[Tensor]:
            for parts in rows.parts():
                for part in parts:
                    found.append(moved.encode(part.x.to(moved.W_enc.device))[:, latent].double().cpu())
                    yield part.y
                bar.advance(len(parts))

        place = None if target == UNKNOWN_SITE else target
        bare = calibrate(states(), SteeringVector.of(row), site=place) if place else SteeringVector.of(row)
        if place is None:
            list(states())
        digest = "" if running is None else running.info.weights_digest
        data_hash = rows.digest
    return _made(read, latent, torch.cat(found), replace(bare, model_digest=digest, data_hash=data_hash))


def _made(sae: SAE, latent: int, values: Tensor, bare: SteeringVector) -> LatentVector:
    active = values[values > 0].sort().values
    if not len(active):
        raise InputError(
            f"latent {latent} never fires on {len(values)} tokens, so nothing says how strong it gets; give more "
            "tokens, or a latent that fires"
        )
    largest, density = float(active[-1]), len(active) / len(values)
    spread = torch.quantile(active, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    quantiles = dict(zip(QUANTILES, spread, strict=True))
    recipe = {
        "method": "sae_latent",
        "latent": latent,
        "trained_as": sae.trained_as,
        "max_activation": largest,
        "density": density,
        "active_quantiles": [[share, value] for share, value in quantiles.items()],
        "decoder_norm": bare.norm,
        "tokens": len(values),
    }
    vector = replace(bare, norm=bare.norm * largest, recipe=recipe)
    return LatentVector(
        latent=latent,
        vector=vector,
        largest=largest,
        density=density,
        active_quantiles=quantiles,
        tokens=len(values),
    )


def export(
    sae: SAE | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    latent: int | None = None,
    scale: float = 1.0,
    positions: str = "all",
    data: Any = None,
    **options: Any,
) -> SAEExport:
    """Write an autoencoder in SAELens's format, or one of its latents as a steering.

    Args:
        sae: an autoencoder, or what `load` reads.
        out: directory: of `cfg.json` and `sae_weights.safetensors`, or with `latent` of `vector.safetensors` and
            `steering.safetensors`.
        latent: the latent to write.
        scale: of the steering, in parts of the latent's largest activation.
        positions: of the steering.
        data: what the latent is calibrated on; see `evaluate`.
        options: more arguments of `latent_vector`.

    Raises:
        InputError: options of a latent without one, a latent without a site, or a directory that cannot be written.
    """
    read = load(sae)
    folder = Path(out)
    if latent is None:
        if scale != 1.0 or positions != "all" or data is not None or options:
            named = ", ".join(options) or "scale, positions or data"
            raise InputError(f"{named} are of a latent, and none was named; give latent=")
        save(read, folder)
        return _exported(read, folder, None)
    made = latent_vector(read, latent, data, **options)
    if made.vector.site is None:
        raise InputError("the autoencoder does not say its site; give site=, such as layers.3.resid_post")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    made.vector.save(folder / VECTOR)
    steering = made.steering(scale, positions=positions)
    steering.save(folder / STEERING)
    return _exported(
        read,
        folder,
        ExportedLatent(
            latent=latent,
            site=str(made.vector.site),
            scale=scale,
            positions=positions,
            max_activation=made.largest,
            density=made.density,
            active_quantiles={f"{share:g}": value for share, value in made.active_quantiles.items()},
            norm=made.vector.norm,
            median_norm=made.vector.median_norm,
            tokens=made.tokens,
            steering_digest=steering.digest,
        ),
    )


def _exported(sae: SAE, folder: Path, latent: ExportedLatent | None) -> SAEExport:
    return SAEExport(
        path=str(folder),
        files=tuple(sorted(one.name for one in folder.iterdir() if one.suffix in (".json", ".safetensors"))),
        architecture=sae.architecture,
        trained_as=sae.trained_as,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        d_out=sae.d_out,
        site=sae.site,
        target_site=sae.target_site,
        latent=latent,
    )
