"""Steering files: safetensors with the canonical form as metadata. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trimtab._base import jsonio
from trimtab._base.files import atomic_write_bytes
from trimtab.errors import InputError, SteeringError
from trimtab.sites import SitePattern
from trimtab.steering import _canonical, gains, registry
from trimtab.steering.positions import Positions

if TYPE_CHECKING:
    from trimtab.steering.spec import BoundOp

_DTYPES = {"float32": torch.float32, "int64": torch.int64}
"""Of the tensors of an op."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        SteeringError: the directory does not exist or cannot be written.
    """
    target = Path(path)
    try:
        atomic_write_bytes(target, safetensors.torch.save(dict(tensors), dict(metadata)))
    except OSError as error:
        raise SteeringError(f"{target} cannot be written: {error.strerror or error}") from error


def read(path: str | os.PathLike[str], formats: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file of ours.

    Raises:
        SteeringError: no such file, not safetensors, another format, or a newer version.
    """
    source = Path(path)
    if not source.is_file():
        what = "is a directory" if source.is_dir() else "no such file"
        raise SteeringError(f"{source}: {what}; give a .safetensors file that save wrote")
    try:
        with safetensors.safe_open(str(source), framework="pt") as stream:
            metadata = dict(stream.metadata() or {})
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError) as error:
        raise SteeringError(f"{source} is not a readable safetensors file: {error}") from error
    _check_format(metadata, str(source), formats, version)
    return tensors, metadata


def _check_format(metadata: Mapping[str, str], where: str, formats: str, version: int) -> None:
    if metadata.get("format") != formats:
        raise SteeringError(f"{where}: its metadata says format {metadata.get('format')!r}; {formats!r} was expected")
    found = metadata.get("version", "")
    if found != str(version):
        newer = found.isdecimal() and int(found) > version
        what = "was written by a newer Trimtab; upgrade" if newer else "is not a version that exists"
        raise SteeringError(f"{where}: version {found!r} {what}; this one reads version {version}")


def save(bound: Sequence[BoundOp], path: str | os.PathLike[str]) -> None:
    """Write the ops of a Steering; equal tensors are stored once, named by their digest."""
    write(path, *_pack(bound))


def dumps(bound: Sequence[BoundOp]) -> bytes:
    """Return the bytes of the file that `save` writes."""
    return safetensors.torch.save(*_pack(bound))


def loads(data: bytes, where: str) -> list[BoundOp]:
    """Read the bytes of a file that `save` wrote; `where` names them in messages."""
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = dict(json.loads(data[8 : 8 + size])["__metadata__"])
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SteeringError(f"{where} is not a steering file: {error}") from error
    _check_format(metadata, where, _canonical.FORMAT, _canonical.VERSION)
    return _unpack(tensors, metadata, where)


def _pack(bound: Sequence[BoundOp]) -> tuple[dict[str, Tensor], dict[str, str]]:
    text = _canonical.text(bound)
    tensors = {}
    for one in bound:
        for item in fields(one.op):
            value = getattr(one.op, item.name)
            if item.init and isinstance(value, Tensor):
                tensors[_canonical.tensor_digest(value)] = value.contiguous()
    metadata = {"format": _canonical.FORMAT, "version": str(_canonical.VERSION), "steering": text}
    return tensors, {**metadata, "digest": _canonical.digest(bound)}


def load(path: str | os.PathLike[str]) -> list[BoundOp]:
    """Read the ops of a Steering, in their order."""
    tensors, metadata = read(path, _canonical.FORMAT, _canonical.VERSION)
    return _unpack(tensors, metadata, str(path))


def _unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> list[BoundOp]:
    from trimtab.steering.spec import BoundOp

    require_keys(metadata, {"format", "version", "steering", "digest"}, where)
    text = metadata["steering"]
    if hashlib.blake2b(text.encode(), digest_size=32).hexdigest() != metadata["digest"]:
        raise SteeringError(f"{where} is corrupt: its text does not match its digest {metadata['digest'][:16]}")
    for name, tensor in tensors.items():
        if _canonical.tensor_digest(tensor) != name:
            raise SteeringError(f"{where} is corrupt: the bytes of tensor {name[:16]} do not match its digest")
    try:
        document = jsonio.loads(text)
        require_keys(document, {"format", "version", "ops"}, where)
        bound = []
        for entry in document["ops"]:
            require_keys(entry, {"site", "positions", "gain", "op"}, where)
            op = _make(registry.KINDS, entry["op"], tensors, where, "op")
            gain = _make(gains.KINDS, entry["gain"], tensors, where, "gain")
            positions = Positions.parse(entry["positions"])
            bound.append(BoundOp(SitePattern.parse(entry["site"]), op, positions, gain))
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise SteeringError(f"{where}: its text is not the canonical form of a Steering: {error}") from error
    except InputError as error:
        raise SteeringError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    return bound


def _make(
    kinds: Mapping[str, Any], entry: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, what: str
) -> Any:
    cls = kinds.get(entry.get("kind", ""))
    if cls is None:
        raise SteeringError(f"{where}: unknown {what} {entry.get('kind')!r}; known: {', '.join(sorted(kinds))}")
    wanted = [one for one in fields(cls) if one.init]
    names = {one.name for one in wanted}
    required = {one.name for one in wanted if one.default is MISSING and one.default_factory is MISSING}
    given = {key: value for key, value in entry.items() if key != "kind"}
    require_keys(given, names, f"{where}: {entry['kind']}", required)
    return cls(**{key: _decode(value, tensors, where) for key, value in given.items()})


def _decode(value: Any, tensors: Mapping[str, Tensor], where: str) -> Any:
    if isinstance(value, dict):
        require_keys(value, {"blake2b", "dtype", "shape"}, where)
        tensor = tensors.get(value["blake2b"])
        if tensor is None:
            raise SteeringError(f"{where} is incomplete: no tensor {value['blake2b'][:16]}; it has {len(tensors)}")
        return _as_named(tensor, value, where)
    if isinstance(value, list):
        return tuple(_decode(item, tensors, where) for item in value)
    if isinstance(value, str) and value.lstrip("-").startswith("0x"):
        return float.fromhex(value)
    return value


def _as_named(tensor: Tensor, value: Mapping[str, Any], where: str) -> Tensor:
    """Return a stored tensor as the text names it: those of equal bytes are stored once, whatever their shapes."""
    dtype, shape = _DTYPES.get(value["dtype"]), value["shape"]
    if dtype is None or tensor.nbytes != dtype.itemsize * prod(shape) or min(shape, default=0) < 0:
        raise SteeringError(
            f"{where} is corrupt: tensor {value['blake2b'][:16]} is {tensor.dtype} {[*tensor.shape]} and should be "
            f"{value['dtype']} {shape}"
        )
    return tensor.reshape(-1).view(dtype).reshape(shape)


def require_keys(given: Mapping[str, Any], known: set[str], where: str, required: set[str] | None = None) -> None:
    """Refuse unknown and missing keys.

    Raises:
        SteeringError: names them, and those that are known or present.
    """
    unknown = sorted(set(given) - known)
    if unknown:
        raise SteeringError(f"{where}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    missing = sorted((known if required is None else required) - set(given))
    if missing:
        raise SteeringError(
            f"{where}: missing keys {', '.join(missing)}; present: {', '.join(sorted(given)) or 'none'}"
        )
