"""A name for weights that is cheap to compute and changes when they do."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import xxhash
from torch import nn

_WHOLE = 50 * 1000 * 1000  # weights up to this size are read in full
_SAMPLE = 4096


def of_directory(path: Path) -> str:
    """Return the digest of the weight files of a directory.

    `xxh3:full:...` covers every byte, when the files have less than 50 MB together; `xxh3:headers:...` covers names,
    sizes and the safetensors headers, which change with names, shapes and dtypes but not with values; "" means that
    there are no weight files.
    """
    files = sorted(one for suffix in ("*.safetensors", "*.bin") for one in path.glob(suffix))
    if not files:
        return ""
    whole = sum(one.stat().st_size for one in files) < _WHOLE
    state = xxhash.xxh3_128()
    for file in files:
        state.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            if whole:
                state.update(stream.read())
            elif file.suffix == ".safetensors":
                length = int.from_bytes(stream.read(8), "little")
                state.update(stream.read(min(length, 1 << 27)))
    return f"xxh3:{'full' if whole else 'headers'}:{state.hexdigest()}"


def of_module(model: nn.Module) -> str:
    """Return the digest of a module's parameters: `xxh3:module-full:...`, or `xxh3:module-sampled:...` above 50 MB."""
    tensors = dict(model.named_parameters())
    whole = sum(one.numel() * one.element_size() for one in tensors.values()) < _WHOLE
    state = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        state.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().reshape(-1)
        if not whole and flat.numel() > _SAMPLE:
            flat = flat[:: max(1, flat.numel() // _SAMPLE)]
        state.update(flat.to("cpu").contiguous().view(torch.uint8).numpy().data)
    return f"xxh3:{'module-full' if whole else 'module-sampled'}:{state.hexdigest()}"
