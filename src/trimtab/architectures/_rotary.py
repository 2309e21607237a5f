"""Rotary frequencies of a layer, from its configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.architectures._family import Config, Sizes
from trimtab.errors import InputError


class Rotary(NamedTuple):
    """What the rotary embedding of one layer multiplies positions by."""

    frequencies: Tensor
    """[rotated dimensions / 2], float32, as the model holds them."""
    factor: float
    """On cosine and sine (YaRN, LongRoPE); 1.0 in most models."""


def rotary(config: Config, layer: int, *, length: int = 1) -> Rotary:
    """Return the rotary frequencies of a layer.

    Args:
        config: text configuration; one that has rotary parameters per layer type is read by the layer's type.
        layer: 0-based.
        length: tokens in the sequence; scaled forms (dynamic NTK, LongRoPE) change their frequencies with it.

    Raises:
        InputError: a form of scaling that transformers does not know.
    """
    parameters: dict[str, Any] = config.rope_parameters
    kind = None
    if "rope_type" not in parameters:
        kind = config.layer_types[layer]
        parameters = parameters[kind]
    form = parameters["rope_type"]
    if form == "default":
        width = int(Sizes.of(config).head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
        return Rotary(1.0 / (parameters["rope_theta"] ** exponents), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if form not in ROPE_INIT_FUNCTIONS:
        raise InputError(f"rotary scaling {form!r} is unknown; known: {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
    keywords = {} if kind is None else {"layer_type": kind}
    seen = max(length, config.max_position_embeddings) if form == "dynamic" else length
    frequencies, factor = ROPE_INIT_FUNCTIONS[form](config, torch.device("cpu"), seq_len=seen, **keywords)
    return Rotary(frequencies.float(), float(factor))
