"""Stands in for torchvision, whose builds for this torch bring CUDA: imports succeed, any use raises.

vLLM's multimodal classes import it for image processors that an engine of their text model never runs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0"


class _Absent(type):
    def __getattr__(cls, name: str) -> _Absent:
        return _absent(name)

    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise NotImplementedError("torchvision is not installed")


def _absent(name: str) -> _Absent:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(name, (), {})


class _Parts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every `torchvision.<part>`, empty."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("torchvision."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        vars(module)["__getattr__"] = _absent
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


sys.meta_path.insert(0, _Parts())
__getattr__ = _absent
