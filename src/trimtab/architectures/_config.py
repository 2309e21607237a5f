"""The configuration of a saved model, and the family that it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from trimtab.architectures._family import Config, Family
from trimtab.architectures._registry import FAMILIES
from trimtab.errors import InputError


class SavedConfig(NamedTuple):
    """What a model's config.json says."""

    top: Config
    """As saved: the wrapper's configuration for a multimodal model."""
    text: Config
    """Of the text decoder."""
    family: Family


def read_config(folder: str | Path) -> SavedConfig:
    """Read the configuration of a saved model.

    Args:
        folder: directory with a config.json.

    Raises:
        InputError: it cannot be read, or the model is of no known family.
    """
    import transformers  # here, because describing a model that is there needs none of its seconds

    try:
        top: Any = transformers.AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the configuration in {folder} cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error
    text = top.get_text_config(decoder=True)
    family = FAMILIES.get(text.model_type)
    if family is None:
        raise InputError(
            f"the model in {folder} is of type {text.model_type!r}, whose arithmetic is in no table of architectures; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    return SavedConfig(top, text, family)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation function that a configuration names.

    Raises:
        InputError: transformers knows no such function.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise InputError(f"activation {name!r} is unknown to transformers")
    return ACT2FN[name]  # type: ignore[no-any-return]
