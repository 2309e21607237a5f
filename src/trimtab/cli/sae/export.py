"""`trimtab sae export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Dtype, given


def export(
    sae: str,
    /,
    *,
    out: Path,
    latent: int | None = None,
    scale: float = 1.0,
    positions: str = "all",
    data: Annotated[str | None, Parameter(alias="-d")] = None,
    site: str | None = None,
    tokens: int = 20_000,
    max_length: int = 128,
    skip_texts: int = 0,
    model: Annotated[str, Parameter(alias="-m")] = "testbed",
    dtype: Dtype = "float32",
    device: str | None = None,
    batch_size: int = 8,
    allow_fallback: Annotated[bool, Parameter(negative="")] = False,
    output: Output = Output(),
) -> int:
    """Write an autoencoder in SAELens's format, or one latent as a steering at the activations that it reaches.

    Args:
        sae: directory of an autoencoder or a training, or Gemma Scope's params.npz.
        out: directory: of cfg.json and sae_weights.safetensors, or with --latent of a vector and a steering file.
        latent: the latent to write.
        scale: of the steering, in parts of the latent's largest activation.
        positions: rows that the steering acts on.
        data: texts or a trace to calibrate the latent on; as in sae eval.
        site: where activations are taken; the autoencoder's own unless given.
        tokens: tokens at most.
        max_length: cut texts after this many tokens.
        skip_texts: texts to pass over first.
        model: a directory, a hub id, or "testbed" for the embedded model.
        dtype: the model's dtype.
        device: cpu, cuda, cuda:1 or mps. Default: cuda when there is one, else cpu.
        batch_size: texts of one forward pass.
        allow_fallback: run a model of unknown family, at sites found by its structure.
    """
    options: dict[str, Any] = {
        "scale": (scale, 1.0),
        "positions": (positions, "all"),
        "tokens": (tokens, 20_000),
        "max_length": (max_length, 128),
        "skip_texts": (skip_texts, 0),
        "model": (model, "testbed"),
        "dtype": (dtype, "float32"),
        "batch_size": (batch_size, 8),
    }
    kwargs = given(latent=latent, data=data, site=site, device=device, allow_fallback=allow_fallback)
    kwargs |= {name: value for name, (value, default) in options.items() if value != default}
    return run(Call(function="trimtab.sae.export", args=(sae, out), kwargs=kwargs), output, show=_text)


def _text(made: Any) -> str:
    shape = f"{made.d_in} -> {made.d_sae} -> {made.d_out}"
    site = f"{made.site or 'site unknown'}{f' to {made.target_site}' if made.target_site else ''}"
    lines = [f"{made.trained_as} autoencoder, {shape}, {site}"]
    one = made.latent
    if one is not None:
        spread = ", ".join(f"{share}: {value:.4g}" for share, value in one.active_quantiles.items())
        lines += [
            f"latent {one.latent} fires on {one.density:.2%} of {one.tokens:,} tokens, up to {one.max_activation:.4g}",
            f"quantiles where it fires: {spread}",
            f"steering at {one.site} on {one.positions}: {one.scale:g} x {one.norm:.4g} in hidden units"
            + (f" (states there: median norm {one.median_norm:.4g})" if one.median_norm else ""),
        ]
    return "\n".join([*lines, f"wrote {', '.join(made.files)} in {made.path}"])
