"""Backends by name."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, cast

from trimtab.backends.base import Backend
from trimtab.errors import InputError, PrerequisiteError

BACKENDS = {
    "hf": ("trimtab.backends.hf", "HFBackend"),
    "mock": ("trimtab.backends.mock", "MockBackend"),
    "vllm": ("trimtab.backends.vllm", "VLLMBackend"),
}


def open_backend(name: str, model: Any, **options: Any) -> Backend:
    """Open a model in a backend.

    Args:
        name: "hf", "mock" or "vllm".
        model: a directory, a hub id, "testbed" (the embedded model), or an `nn.Module` (with `tokenizer=`).
        options: of the backend: `dtype`, `device`, `batch_size`, `allow_fallback` and others; see its class.

    Raises:
        InputError: no such backend, model or option.
        PrerequisiteError: the backend is not part of this installation.

    Example:
        >>> backend = open_backend("hf", "testbed", dtype="bfloat16")  # doctest: +SKIP
    """
    if name not in BACKENDS:
        raise InputError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    module, kind = BACKENDS[name]
    if importlib.util.find_spec(module) is None:
        raise PrerequisiteError(f"the backend {name!r} is not part of this installation; use one of hf, mock")
    cls = getattr(importlib.import_module(module), kind)
    try:
        return cast(Backend, cls(model, **options))
    except TypeError as error:
        if "unexpected keyword argument" in str(error) and kind in str(error):
            raise InputError(f"backend {name!r}: {error}; see help({kind})") from error
        raise
