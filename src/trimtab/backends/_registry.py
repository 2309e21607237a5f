"""Backends by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any, cast

import torch

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
        more = "; sweep alone takes several of them" if "," in name else ""
        raise InputError(f"no backend {name!r}; there are {', '.join(BACKENDS)}{more}")
    module, kind = BACKENDS[name]
    if importlib.util.find_spec(module) is None:
        raise PrerequisiteError(f"the backend {name!r} is not part of this installation; use one of hf, mock")
    cls = getattr(importlib.import_module(module), kind)
    known = [option for option in inspect.signature(cls).parameters if option != "model"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise InputError(f"backend {name!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    if options.get("device") is not None:
        options["device"] = str(options["device"])
        _check_device(options["device"], must_exist=not isinstance(model, torch.nn.Module))
    return cast(Backend, cls(model, **options))


def _check_device(device: str, *, must_exist: bool) -> None:
    """Refuse a device that does not exist here, before a model is loaded for it."""
    kind, _, index = device.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind)
    if count is None or (index and not index.isdecimal()):
        raise InputError(f"device {device!r}: use cpu, cuda, cuda:N or mps")
    if must_exist and int(index or 0) >= count:
        here = f"there is no more than {count} of that kind" if count else f"this machine or this torch has no {kind}"
        raise InputError(f"device {device!r}: {here}; use another, or leave it out to take the best there is")
