"""Refusals and warnings about a model's state that would falsify what is read from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.architectures._registry import text_config
from trimtab.errors import BackendError


def check_model(model: nn.Module) -> tuple[str, ...]:
    """Refuse a model whose numbers would not be those of its checkpoint.

    Returns:
        Warnings about what is allowed but changes numbers, one line each.

    Raises:
        BackendError: training mode, rounded rotary tables, or active autocast; all of them are named.
    """
    problems = [*_training(model), *_rotary(model), *_autocast(model)]
    if problems:
        raise BackendError("; ".join(problems))
    return (*_softcap(model), *_matmul_precision())


def _training(model: nn.Module) -> list[str]:
    if not model.training:
        return []
    return ["the model is in training mode, in which dropout is drawn anew on every call; call model.eval() first"]


def _rotary(model: nn.Module) -> list[str]:
    """RoPE's frequencies must have been computed in float32; in bfloat16 the cosine at position 2000 is off by 0.35."""
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2].endswith("inv_freq") and _rounded(buffer):
            return [
                f"{name} was rounded ({buffer.dtype}): the model was cast after loading, which moves every rotary "
                "angle; reload it with from_pretrained(..., dtype=...) instead of calling .to(dtype) or .half()"
            ]
    return []


def _rounded(frequencies: Tensor) -> bool:
    if frequencies.dtype not in (torch.float32, torch.float64):
        return True
    values = frequencies.double()
    powers_of_two = bool((torch.frexp(values).mantissa == 0.5).all())
    if frequencies.numel() < 4 or powers_of_two or frequencies.is_meta:
        return False
    # Cast down and up again: every value fits a coarser dtype, which no table of this length does by chance.
    return any(bool((values.to(dtype).double() == values).all()) for dtype in (torch.bfloat16, torch.float16))


def _autocast(model: nn.Module) -> list[str]:
    parameter = next(model.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    if not torch.is_autocast_enabled(device):
        return []
    return [f"autocast is active on {device}; leave the block and load the model in the dtype that is meant"]


def _softcap(model: nn.Module) -> list[str]:
    config = text_config(model)
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is None or config._attn_implementation != "sdpa":
        return []
    return [
        f"attention runs under sdpa, which drops this model's attention softcap of {cap:g}; load it with "
        'attn_implementation="eager" to keep it'
    ]


def _matmul_precision() -> list[str]:
    precision = torch.get_float32_matmul_precision()
    if precision == "highest":
        return []
    return [
        f"torch.set_float32_matmul_precision is {precision!r}: float32 products may be rounded to fewer bits; "
        "set it to 'highest' for a float32 reference"
    ]
