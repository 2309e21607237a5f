"""`trimtab sae eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Dtype, given


def eval(
    saes: Annotated[tuple[str, ...], Parameter(negative="")],
    /,
    *,
    data: Annotated[str | None, Parameter(alias="-d")] = None,
    site: str | None = None,
    target_site: str | None = None,
    tokens: int = 20_000,
    max_length: int = 128,
    skip_texts: int = 0,
    splice: bool = True,
    latents: int = 12,
    latent: Annotated[tuple[int, ...], Parameter(negative="", consume_multiple=True)] = (),
    examples: int = 5,
    precision: Annotated[tuple[Path, ...], Parameter(negative="", consume_multiple=True)] = (),
    seed: int = 0,
    model: Annotated[str, Parameter(alias="-m")] = "testbed",
    dtype: Dtype = "float32",
    device: str | None = None,
    batch_size: int = 8,
    allow_fallback: Annotated[bool, Parameter(negative="")] = False,
    out: Path | None = None,
    html: Path | None = None,
    output: Output = Output(),
) -> int:
    """Evaluate autoencoders of one site on one fixed set: FVU, L0, what the model loses, dead latents, examples.

    Args:
        saes: directories of autoencoders (ours, SAELens's, Gemma Scope's) or of trainings.
        data: a .txt, .jsonl or .parquet file, datasets:NAME, or the directory of a trace. Default: text of the
            embedded model that a default training never saw.
        site: where activations are taken; the autoencoders' own unless given.
        target_site: where the target of a transcoder is taken; its own unless given.
        tokens: tokens at most.
        max_length: cut texts after this many tokens.
        skip_texts: texts to pass over first, such as those of the training.
        splice: measure cross entropy and KL with the reconstruction in the model.
        latents: how many latents to show, spread over their densities.
        latent: latents to show instead, by number.
        examples: strongest firings to show of each.
        precision: JSON files of sae precision, to show with it.
        seed: of intervals and samples.
        model: a directory, a hub id, or "testbed" for the embedded model.
        dtype: the model's dtype.
        device: cpu, cuda, cuda:1 or mps. Default: cuda when there is one, else cpu.
        batch_size: texts of one forward pass.
        allow_fallback: splice into a model of unknown family, at sites found by its structure.
        out: directory for evaluation.json.
        html: also write the report there.
    """
    options: dict[str, Any] = {
        "tokens": (tokens, 20_000),
        "max_length": (max_length, 128),
        "skip_texts": (skip_texts, 0),
        "splice": (splice, True),
        "latents": (list(latent) or latents, 12),
        "examples": (examples, 5),
        "precision": (list(precision), []),
        "seed": (seed, 0),
        "model": (model, "testbed"),
        "dtype": (dtype, "float32"),
        "batch_size": (batch_size, 8),
    }
    kwargs = given(data=data, site=site, target_site=target_site, device=device, allow_fallback=allow_fallback, out=out)
    kwargs |= {name: value for name, (value, default) in options.items() if value != default}
    call = Call(function="trimtab.sae.evaluate", args=(list(saes),), kwargs=kwargs)
    return run(call, output, html=html)
