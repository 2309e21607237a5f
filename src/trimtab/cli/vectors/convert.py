"""`trimtab vectors convert`."""

from __future__ import annotations

from pathlib import Path

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def convert(
    source: str,
    out: Path,
    /,
    *,
    layer: int | None = None,
    key: str | None = None,
    site: str | None = None,
    model_hint: str | None = None,
    output: Output = Output(),
) -> int:
    """Write a vector in another format.

    Args:
        source: any vector file: ours, .pt, .npy, .gguf, a persona file, a PCA file, testbed:NAME.
        out: file to write: .safetensors, .npy, .pt or .gguf.
        layer: layer to take from a file of several.
        key: entry to take from a file of several, such as raw:pos_3 or PC1.
        site: where the vector acts, when the file does not say.
        model_hint: llama.cpp's name of the architecture, such as qwen3; for .gguf.
    """
    kwargs = given(layer=layer, key=key, site=site, model_hint=model_hint)
    return run(Call(function="trimtab.vectors.convert", args=(source, out), kwargs=kwargs), output)
