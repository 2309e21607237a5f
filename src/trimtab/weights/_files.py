"""The safetensors files of a checkpoint: which tensor lies where, its shape, and mapped reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import InputError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Stored(NamedTuple):
    """One tensor of the files."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, F8_E4M3, ..."""


def scan(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a checkpoint by name, from the headers of its files.

    Raises:
        InputError: no safetensors files, a shard is missing, or one was cut off.
    """
    found: dict[str, Stored] = {}
    for file in _shards(folder):
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - safetensors' own method, not a mapping's
                part = handle.get_slice(name)
                found[name] = Stored(file, tuple(part.get_shape()), str(part.get_dtype()))
    return found


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        hint = f"it holds {', '.join(others[:3])}: load the model and save_pretrained() it again" if others else (
            f"{_SINGLE} or {_INDEX} was expected"
        )  # fmt: skip
        raise InputError(f"{folder} holds no safetensors weights; {hint}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} cannot be read as an index of shards: {error}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}; copy them")
    return [folder / name for name in names]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read, it may have been cut off: {' '.join(str(error).split())}") from error


class Reader:
    """Reads tensors of a checkpoint by name; what is read is mapped, not copied.

    A reader maps each file once, when it is first needed. The mapping goes when the reader and every tensor that it
    gave are gone, so one reader per layer keeps one layer in memory.
    """

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored
        self._handles: dict[Path, Any] = {}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype.

        Raises:
            InputError: the file has gone or was cut off since it was scanned.
        """
        file = self._stored[name].file
        if file not in self._handles:
            self._handles[file] = _open(file)
        found: Tensor = self._handles[file].get_tensor(name)
        return found
