"""What one file holds: tensors at paths inside of it, and what is no tensor, with the reason."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch

from trimtab.trace.foreign._archive import Refused, first_line, load

SUFFIXES = (".pt", ".npy", ".safetensors")
_MAX_LEAVES = 10_000
_MAX_DEPTH = 16
_FREE_BYTES = 1 << 28  # an expanded tensor may stand for this many bytes that the file does not hold
_NUMBERS = (bool, int, float, complex)

Key = tuple[str | int, ...]


class Leaf(NamedTuple):
    """One value in a file; `tensor` is None for what cannot be compared, and `reason` says why."""

    key: Key
    tensor: torch.Tensor | None
    reason: str = ""


class Safe(NamedTuple):
    """An open safetensors file; its tensors are read one by one."""

    file: Any
    names: tuple[str, ...]


def read_payload(path: Path) -> Any:
    """Return what a file holds, its values not yet read.

    Raises:
        Refused: the file cannot be read, or not safely.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Refused("it is no regular file")
        if path.suffix == ".pt":
            return load(path)
        if path.suffix == ".npy":
            return _load_npy(path)
        opened: Any = safetensors.safe_open(path, framework="pt")
        return Safe(opened, tuple(opened.keys()))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise Refused(f"it cannot be read: {text}") from error


def leaves(payload: Any, prefix: Key = ()) -> Iterator[Leaf]:
    """Yield every value; containers element by element.

    Raises:
        Refused: it is nested too deeply, or has too many elements.
    """
    for count, leaf in enumerate(_walk(payload, prefix)):
        if count >= _MAX_LEAVES:
            raise Refused(f"it holds more than {_MAX_LEAVES} values")
        yield leaf


def find(payload: Any, key: Sequence[str | int]) -> torch.Tensor:
    """Return the tensor at a key.

    Raises:
        Refused: there is none any more.
    """
    here = payload
    for step in key:
        try:
            here = here.file.get_tensor(step) if isinstance(here, Safe) else here[step]
        except (KeyError, IndexError, TypeError, safetensors.SafetensorError) as error:
            raise Refused(f"it has no {'.'.join(map(str, key))} any more; import it again") from error
    leaf = _leaf((), here)
    if leaf.tensor is None:
        raise Refused(leaf.reason)
    return leaf.tensor


def encode_key(key: Key) -> str:
    """Return a key as the index holds it."""
    return json.dumps(key)


def decode_key(text: str) -> list[str | int]:
    """Return the key that `encode_key` wrote.

    Raises:
        Refused: it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the index holds {text[:80]!r} for its place in the file; import it again") from error
    if not isinstance(found, list) or not all(isinstance(step, (str, int)) for step in found):
        raise Refused(f"the index holds {text[:80]!r} for its place in the file; import it again")
    return found


def _walk(value: Any, key: Key) -> Iterator[Leaf]:
    if len(key) > _MAX_DEPTH:
        raise Refused(f"it is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Safe):
        for name in value.names:
            yield from _walk(value.file.get_tensor(name), (*key, name))
    elif isinstance(value, dict):
        for name, inner in value.items():
            if type(name) in (str, int):
                yield from _walk(inner, (*key, name))
            else:
                yield Leaf((*key, str(name)[:80]), None, f"its key is a {type(name).__name__}")
    elif isinstance(value, (list, tuple)) and not _numbers(value):
        for index, inner in enumerate(value):
            yield from _walk(inner, (*key, index))
    else:
        yield _leaf(key, value)


def _leaf(key: Key, value: Any) -> Leaf:
    """Return a tensor for a tensor, a number, a sequence of numbers, a text (its UTF-8 bytes) or None (no bytes)."""
    if isinstance(value, torch.Tensor):
        reason = _unfit(value)
        return Leaf(key, None if reason else value.detach(), reason)
    if value is None or isinstance(value, str):
        text = (value or "").encode(errors="surrogatepass")
        return Leaf(key, torch.tensor(list(text), dtype=torch.uint8))
    if isinstance(value, _NUMBERS) or _numbers(value):
        with contextlib.suppress(OverflowError, RuntimeError, TypeError, ValueError):
            double = torch.complex128 if _is(value, complex) else torch.float64
            return Leaf(key, torch.tensor(value, dtype=double if _is(value, (float, complex)) else None))
        return Leaf(key, None, "a number outside of 64 bits")
    return Leaf(key, None, f"a {type(value).__name__} is no tensor")


def _is(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return any(isinstance(one, kinds) for one in (value if isinstance(value, (list, tuple)) else (value,)))


def _numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, _NUMBERS) for one in value)


def _unfit(tensor: torch.Tensor) -> str:
    """Return why a tensor has no plain values; empty when it has.

    Raises:
        Refused: it claims far more values than there are.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        return f"a tensor without plain values (layout {tensor.layout}, device {tensor.device})"
    claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > max(held, _FREE_BYTES):
        raise Refused(f"shape {list(tensor.shape)[:8]} claims {claimed} bytes; the file holds {held} for it")
    return ""


def _load_npy(path: Path) -> torch.Tensor:
    """Map an array, after its header was checked against the size of the file."""
    header: Any = np.lib.format
    try:
        with path.open("rb") as stream:
            version = header.read_magic(stream)
            read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            offset = stream.tell()
    except Exception as error:  # numpy lets the errors of Python's tokenizer through
        raise Refused(f"it cannot be read: {first_line(error)}") from error
    if dtype.hasobject or dtype.kind not in "biufc":
        raise Refused(f"its dtype {dtype} holds no numbers")
    count = 1
    for extent in shape:
        if not 0 <= extent < 1 << 62:
            raise Refused(f"its shape {shape[:8]} is impossible")
        count *= extent
    if count * dtype.itemsize != path.stat().st_size - offset:
        raise Refused(f"its header claims {count * dtype.itemsize} bytes; {path.stat().st_size - offset} follow")
    if not count:
        return torch.from_numpy(np.zeros(shape, dtype.newbyteorder("=")))
    mapped = np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C")
    native = mapped if dtype.isnative else mapped.astype(dtype.newbyteorder("="))
    try:
        return torch.from_numpy(np.asarray(native))
    except TypeError as error:
        raise Refused(f"torch has no dtype {dtype}") from error
