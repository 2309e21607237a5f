"""Foreign `.pt` files: looked at before they are loaded, and loaded without running code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import VectorError

MAX_BYTES = 2**31
"""Largest archive that is loaded as a vector file."""


def load(path: Path) -> Any:
    """Load a file written by `torch.save`.

    `torch.save` stores its entries uncompressed, so a compressed entry, or entries that claim more bytes than the file
    has, are refused before anything is unpacked. Only tensors and plain containers are built (`weights_only=True`).

    Raises:
        VectorError: no such file, too large, pathological, not a torch file, or one that would run code.
    """
    if not path.is_file():
        raise VectorError(f"{path}: no such file")
    check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise VectorError(
                f"{path} holds Python objects, which could run code, and is not loaded; save plain tensors instead"
            ) from error
        raise VectorError(f"{path} is not a readable torch file: {reason[0]}") from error


def check_storage(tensor: Tensor, what: str) -> Tensor:
    """Return a dense tensor that is no larger than the bytes behind it.

    Raises:
        VectorError: it is sparse, or a view that repeats its bytes.
    """
    if tensor.layout is not torch.strided:
        raise VectorError(f"{what}: layout {tensor.layout} was given; a dense tensor was expected")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise VectorError(f"{what}: shape {list(tensor.shape)} claims more values than the file holds")
    return tensor


def check_archive(path: Path) -> None:
    """Refuse a file that is too large, or an archive that would unpack to more than it has.

    Raises:
        VectorError: either.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise VectorError(f"{path} has {size} bytes; a vector file has at most {MAX_BYTES}")
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise VectorError(f"{path} is a damaged archive: {error}") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    claimed = sum(entry.file_size for entry in entries)
    if packed or claimed > size:
        why = f"entry {packed[0]!r} is compressed" if packed else f"its entries claim {claimed} bytes of {size}"
        raise VectorError(f"{path} was not written by torch.save ({why}) and is not unpacked")
