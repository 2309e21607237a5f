"""Tiny models with other options than the family's tiny model has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.testing.models import tiny


def variant(family: str, out: Path, **options: Any) -> nn.Module:
    """Build a tiny model of a family with other options of its text decoder, and save it.

    Weights that the plain tiny model has are its own; others are random.
    """
    plain = tiny(family)
    config = copy.deepcopy(plain.config)
    for name, value in options.items():
        setattr(config.get_text_config(decoder=True), name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = type(plain)(config).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1
    model.load_state_dict(plain.state_dict(), strict=False)
    model.save_pretrained(out)
    return model
