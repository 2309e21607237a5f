"""Files of `torch.save`, looked at before they are loaded, and loaded without running code."""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

_MAGIC = b"PK\x03\x04"
_MAX_PICKLE = 8 << 20  # bytes of structure; the values lie outside of it
_MAX_ENTRIES = 200_000
_HARMLESS = re.compile(
    r"collections OrderedDict|torch Size|torch device|(__builtin__|builtins) (set|complex)|_codecs encode"
    r"|torch \w*Storage|torch\.storage (Untyped|Typed)Storage"
    r"|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter|parameter_with_state)"
)
_NUMPY = re.compile(r"numpy\.(_core|core)\.multiarray scalar|numpy dtype|_codecs encode")
_UNPICKLER = re.compile(r"WeightsUnpickler error: (.{1,200})")  # torch says it below a page of advice


class Refused(Exception):
    """Why a file is not read; becomes the reason of its records."""


def load(path: Path) -> Any:
    """Load a file of `torch.save`; its tensors stay in the file, mapped.

    `torch.save` stores its entries as they are, so a compressed entry, or entries that claim more bytes than the file
    has, are refused before anything is unpacked; so is a structure that names anything but tensors and plain
    containers. What is left is loaded with `weights_only=True`. A single number of numpy, alone or as the `value` of a
    dump, is read off the opcodes; torch would have to trust numpy's own classes for it.

    Raises:
        Refused: with the reason.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise Refused("it is no archive of torch.save (torch 1.6 or later)")
    structure = _structure(path, size)
    found = _numpy_number(structure)
    if found is not None:
        return found
    _check_structure(structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a hostile file makes torch raise
            said = _UNPICKLER.search(str(error))
            raise Refused(f"torch cannot load it: {said[1] if said else first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__


def _structure(path: Path, size: int) -> bytes:
    """Check the archive and return the pickle in it, which is not run."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries, size)
            pickles = [one for one in entries if one.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise Refused(f"it holds {len(pickles)} entries data.pkl; torch.save writes one")
            if pickles[0].file_size > _MAX_PICKLE:
                raise Refused(f"its structure has {pickles[0].file_size} bytes; at most {_MAX_PICKLE} are read")
            return archive.read(pickles[0])
    except Refused:
        raise
    except Exception as error:  # zipfile raises many kinds on damaged archives
        raise Refused(f"a damaged archive: {first_line(error)}") from error


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    if len(entries) > _MAX_ENTRIES:
        raise Refused(f"its archive has {len(entries)} entries; at most {_MAX_ENTRIES} are read")
    packed = [one.filename for one in entries if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1]
    if packed:
        raise Refused(f"entry {packed[0][:80]!r} is compressed or encrypted, which torch.save never does")
    claimed = sum(max(one.file_size, one.compress_size) for one in entries)
    if claimed > size:
        raise Refused(f"its entries claim {claimed} bytes of {size}, so it was not written by torch.save")
    if len({one.filename for one in entries}) < len(entries):
        raise Refused("two entries of its archive have one name")


def _check_structure(data: bytes) -> None:
    """Refuse a pickle that names anything but tensors and plain containers; reads its opcodes and runs none."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise Refused(f"it uses the pickle opcode {opcode.name}, which torch.save does not write")
            if opcode.name == "GLOBAL" and not _HARMLESS.fullmatch(str(argument)) and not _is_dtype(str(argument)):
                name = str(argument).replace(" ", ".")[:80]
                raise Refused(f"it holds {name}, which is no tensor and could run code; save tensors instead")
    except Refused:
        raise
    except Exception as error:  # pickletools raises many kinds on damaged bytes
        raise Refused(f"a damaged structure: {first_line(error)}") from error


def _numpy_number(data: bytes) -> Any:
    """Return what a pickle holds that is one scalar of numpy, or a dict with one as its `value`; None for others."""
    if b"multiarray" not in data:
        return None
    names: list[str] = []
    texts: dict[str, list[str]] = defaultdict(list)  # the texts after each name
    before = at = ""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            text = str(argument)
            if opcode.name == "GLOBAL":
                at = at or before
                names.append(text)
            elif opcode.name == "BINUNICODE" and names:
                texts[names[-1]].append(text)
            if opcode.name != "BINPUT":
                before = f"{opcode.name} {text}"
        if not all(map(_NUMPY.fullmatch, names)) or len(set(names)) != 3 or len(names) != 3:
            return None
        (kind, order), raw = texts["numpy dtype"][:2], texts["_codecs encode"][0].encode("latin1")
        if not re.fullmatch(r"[biufc]\d{1,2}", kind) or order not in "<|" or len(raw) != np.dtype(kind).itemsize:
            return None
        number = np.frombuffer(raw, np.dtype(f"<{kind}"))[0].item()
        return number if at == "PROTO 2" else {"value": number} if at == "BINUNICODE value" else None
    except Exception:  # damaged bytes; the check of the structure says how
        return None


def _is_dtype(name: str) -> bool:
    module, _, text = name.partition(" ")
    return module == "torch" and isinstance(getattr(torch, text, None), torch.dtype)
