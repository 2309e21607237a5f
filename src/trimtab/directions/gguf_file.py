"""GGUF control vectors, both ways.

A file has architecture "controlvector", `controlvector.model_hint` (string), `controlvector.layer_count` (how many
directions it holds) and one-dimensional float32 tensors `direction.N`.

Index law: `direction.N` is added to the output of decoder block N, counted from 0, which is `layers.N.resid_post` here.
llama.cpp adds it after the feed-forward residual of block `il = N` (`build_cvec`) and has no slot for N = 0 ("there's
never a tensor for layer 0"); repeng trains entry N from `hidden_states[N + 1]`, the same tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimtab._base.optional import require
from trimtab.errors import SteeringError, VectorError
from trimtab.steering import Add, Constant, Steering

ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(\d+)")


@dataclass(frozen=True, kw_only=True, eq=False)
class GGUFVectors:
    """A control vector file: layer -> float32 [d], in ascending order."""

    directions: Mapping[int, Tensor]
    model_hint: str
    layer_count: int


def read_gguf(path: str | os.PathLike[str]) -> GGUFVectors:
    """Read a GGUF control vector; tensor `direction.N` becomes entry N, the output of block N.

    Raises:
        PrerequisiteError: the gguf package is not installed.
        VectorError: not GGUF, another architecture, no direction, layer 0, or a tensor that is not float32 [d].
    """
    gguf = require("gguf", extra="gguf", feature="reading GGUF control vectors")
    try:
        reader = gguf.GGUFReader(os.fspath(path))
        architecture = reader.get_field("general.architecture")
        kind = "" if architecture is None else architecture.contents()
        hint = reader.get_field(f"{ARCHITECTURE}.model_hint")
        count = reader.get_field(f"{ARCHITECTURE}.layer_count")
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors if _NAME.fullmatch(tensor.name)}
        found = [tensor.name for tensor in reader.tensors]
    except Exception as error:
        raise VectorError(
            f"{path} is not a readable GGUF file: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    if kind != ARCHITECTURE:
        raise VectorError(f"{path}: GGUF architecture {kind!r}; {ARCHITECTURE!r} was expected")
    if not tensors:
        raise VectorError(f"{path} holds no direction.N; tensors: {', '.join(found[:20]) or 'none'}")
    directions = {}
    for name, data in sorted(tensors.items(), key=lambda item: int(item[0].split(".")[1])):
        layer = int(name.split(".")[1])
        if layer < 1:
            raise VectorError(f"{path}: {name} has no meaning; GGUF control vectors begin at the output of block 1")
        if data.dtype != np.float32 or data.ndim != 1:
            raise VectorError(f"{path}: {name} is {data.dtype} {list(data.shape)}; float32 [d] was expected")
        directions[layer] = torch.from_numpy(data.copy())
    widths = sorted({int(one.shape[0]) for one in directions.values()})
    if len(widths) > 1:
        raise VectorError(f"{path}: directions of widths {', '.join(map(str, widths))} in one file")
    return GGUFVectors(
        directions=directions,
        model_hint="" if hint is None else str(hint.contents()),
        layer_count=len(directions) if count is None else int(count.contents()),
    )


def write_gguf(path: str | os.PathLike[str], directions: Mapping[int, Tensor], *, model_hint: str) -> None:
    """Write a GGUF control vector; entry N, added at the output of block N, becomes `direction.N`.

    Args:
        path: file to write.
        directions: layer -> [d]; the strength is in the norm.
        model_hint: llama.cpp's name of the model's architecture, such as "qwen3".

    Raises:
        PrerequisiteError: the gguf package is not installed.
        SteeringError: layer 0, no direction, or several widths: what the format cannot hold.
    """
    gguf = require("gguf", extra="gguf", feature="writing GGUF control vectors")
    widths = sorted({int(one.shape[-1]) for one in directions.values()})
    if len(widths) != 1:
        raise SteeringError(f"a GGUF control vector holds directions of one width; got {widths or 'no direction'}")
    if min(directions) < 1:
        raise SteeringError(
            f"layer {min(directions)}: a GGUF control vector begins at the output of block 1; leave that layer out"
        )
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    writer = gguf.GGUFWriter(os.fspath(partial), ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
    for layer in sorted(directions):
        writer.add_tensor(f"direction.{layer}", directions[layer].detach().cpu().float().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise SteeringError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        writer.close()
    partial.replace(target)


def steering_to_gguf(steering: Steering, path: str | os.PathLike[str], *, model_hint: str, num_layers: int) -> None:
    """Write a Steering that only adds vectors at block outputs; vectors at one layer are summed.

    Raises:
        SteeringError: an op, site, position, gain or layer that GGUF cannot hold; the message names it.
    """
    total: dict[int, Tensor] = {}
    for one in steering.bound:
        op, where = one.op, f"{one.pattern}: {one.op.kind}"
        if not isinstance(op, Add):
            raise SteeringError(f"{where}: a GGUF control vector holds only vectors to add")
        if op.unit != "absolute" or op.max_ratio is not None:
            what = f"max_ratio={op.max_ratio:g}" if op.max_ratio is not None else f"unit={op.unit!r}"
            raise SteeringError(f"{where}: GGUF cannot hold {what}; only absolute vectors")
        if one.pattern.point != "resid_post" or one.pattern.module is not None:
            raise SteeringError(f"{where}: GGUF vectors act at layers.N.resid_post, not at {one.pattern.point}")
        if not one.positions.every:
            raise SteeringError(
                f"{where}: GGUF cannot hold positions {one.positions.canonical()!r}; it steers every row"
            )
        if not isinstance(one.gain, Constant):
            raise SteeringError(f"{where}: GGUF cannot hold the gain {one.gain}; only a constant")
        amount = op.vector.double() * op.scale * one.gain.value
        for layer in one.pattern.layers(num_layers):
            total[layer] = total[layer] + amount if layer in total else amount
    write_gguf(path, {layer: vector.float() for layer, vector in total.items()}, model_hint=model_hint)
