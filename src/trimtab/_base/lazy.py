"""Packages whose names are imported when they are used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package.

    A name stays what the package says it is: importing a part of the package that has the same name does not bind it.

    Args:
        package: its `__name__`.
        where: per public name the part that holds it, below the package. `part` has it by that name, `part:other` by
            another; `part:` is the name itself.
    """
    module = sys.modules[package]

    def find(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        part, colon, attribute = where[name].partition(":")
        value: Any = importlib.import_module(f"{package}.{part}")
        if attribute or not colon:
            value = getattr(value, attribute or name)
        vars(module)[name] = value
        return value

    def listed() -> list[str]:
        return sorted({*vars(module), *module.__all__})

    class Package(ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            if not (name in where and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    module.__class__ = Package
    return find, listed
