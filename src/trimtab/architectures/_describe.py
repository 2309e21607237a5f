"""From a model to its map: by the table where the family is known, else by structure."""

from __future__ import annotations

from torch import nn

from trimtab.architectures._map import ModelMap
from trimtab.architectures._probe import probe
from trimtab.architectures._registry import FAMILIES, by_table, text_config


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
