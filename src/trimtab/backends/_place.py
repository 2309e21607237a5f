"""Where a model lies on disk."""

from __future__ import annotations

import re
from pathlib import Path

from trimtab import testbed
from trimtab.errors import InputError

_HUB = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
VOCABULARIES = ("tokenizer.json", "tokenizer.model*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
"""Files of which a tokenizer has at least one."""


def locate(name: str) -> str:
    """Return the directory or hub id that a model name stands for.

    Raises:
        InputError: neither; names what would be right.
    """
    if name == "testbed":
        return str(testbed.path())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model {name!r} is a directory without a config.json; a saved model was expected")
        return str(path)
    if path.exists():
        raise InputError(f"model {name!r} is a file; the directory of a saved model was expected")
    if not _HUB.fullmatch(name) or name.startswith("."):
        raise InputError(
            f"model {name!r}: no such directory; give the directory of a saved model, a hub id such as "
            "Qwen/Qwen3-0.6B, or testbed"
        )
    return name


def has_vocabulary(folder: Path) -> bool:
    """Whether a directory holds the files of a tokenizer."""
    return any(any(folder.glob(name)) for name in VOCABULARIES)
