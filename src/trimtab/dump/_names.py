"""Names of modules and parameters: those of the bare model, however it is wrapped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.hooks import is_compiled

WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""Classes that only wrap one child, and the child's name."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True)
class Place:
    """A module of a model."""

    path: str
    """Dotted path in the bare model; "" is the model."""
    module: nn.Module
    reason: str
    """Why it cannot be hooked; empty when it can."""


def places(model: nn.Module) -> Iterator[Place]:
    """Yield every module once, callers before what they call, under the names of the bare model."""
    yield from _walk(model, "", "", {})


def _walk(module: nn.Module, path: str, inside: str, seen: dict[int, str]) -> Iterator[Place]:
    if id(module) in seen:
        return
    seen[id(module)] = path
    kind = type(module).__name__
    wrapped = WRAPPERS.get(kind) if WRAPPERS.get(kind) in module._modules else None
    reason = ""
    if inside:
        reason = f"runs inside code compiled by torch.compile ({inside})"
    elif is_compiled(module):  # its own calls are seen from outside the compiled code
        inside = path or "the model"
        if wrapped is not None:
            seen[id(module._modules[wrapped])] = path
            yield Place(path, module, "")
            yield from _below(module._modules[wrapped], path, None, inside, seen)
            return
    elif wrapped is not None:
        reason = f"wrapper ({kind}); what it wraps is recorded under this name"
    elif isinstance(module, _CONTAINERS):
        reason = f"container ({kind}), which is not called"
    elif kind in ("RecursiveScriptModule", "ScriptModule", "TopLevelTracedModule"):
        reason = "TorchScript, whose hooks are fixed when it is scripted"
    yield Place(path, module, reason)
    yield from _below(module, path, wrapped, inside, seen)


def _below(module: Any, path: str, wrapped: str | None, inside: str, seen: dict[int, str]) -> Iterator[Place]:
    for name, child in module._modules.items():
        if child is not None:
            below = path if name == wrapped else f"{path}.{name}" if path else name
            yield from _walk(child, below, inside, seen)


def owned(model: nn.Module, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield name and tensor of every parameter or buffer, each once, under the names of the bare model.

    Args:
        model: the model, wrapped or bare.
        kind: "_parameters" or "_buffers".
    """
    seen: set[int] = set()
    for place in places(model):
        for name, tensor in getattr(place.module, kind).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{place.path}.{name}" if place.path else name, tensor


def bare_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the model's author wrote; FSDP2 puts its own in front, torch.compile around."""
    if type(module).__name__ == "OptimizedModule":
        module = module._modules["_orig_mod"] or module
    line = type(module).__mro__
    return line[2] if len(line) > 2 and line[1].__name__ == "FSDPModule" else line[0]


@functools.lru_cache(maxsize=4096)
def source(kind: type) -> tuple[str | None, int | None]:
    """Return file and line where a class is written; None for a class without source."""
    try:
        return inspect.getsourcefile(kind), inspect.getsourcelines(kind)[1]
    except (OSError, TypeError):
        return None, None


def layer_of(path: str) -> int | None:
    """Return the layer that a module path lies in: its first number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
