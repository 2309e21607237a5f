"""Where the sites of a model are: one table entry per family, and a structural probe for unknown ones.

`describe(model)` returns the `ModelMap`; `check_model(model)` refuses a model in a state that falsifies numbers.
"""

from __future__ import annotations

from torch import nn

from trimtab.architectures._check import check_model
from trimtab.architectures._family import BlockPaths, Disk, Family, Numerics, Rope, Sizes, Vllm
from trimtab.architectures._handle import Columns, Handle
from trimtab.architectures._map import ModelMap
from trimtab.architectures._probe import probe
from trimtab.architectures._registry import FAMILIES, by_table, text_config

__all__ = [
    "FAMILIES",
    "BlockPaths",
    "Columns",
    "Disk",
    "Family",
    "Handle",
    "ModelMap",
    "Numerics",
    "Rope",
    "Sizes",
    "Vllm",
    "check_model",
    "describe",
    "probe",
]


def describe(model: nn.Module, *, allow_fallback: bool = False) -> ModelMap:
    """Find the sites of a causal language model.

    Args:
        model: a transformers model; wrappers around a text tower are looked into.
        allow_fallback: a model of no known family may also be steered. It can be read in any case, by structure.

    Returns:
        The map. `fallback` says whether the sites were found by structure.

    Raises:
        BackendError: not a transformers model, or no chain of decoder blocks was found.
    """
    family = FAMILIES.get(text_config(model).model_type)
    return probe(model, allow_fallback=allow_fallback) if family is None else by_table(model, family)
