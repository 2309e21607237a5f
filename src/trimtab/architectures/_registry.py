"""The table of families, by `config.model_type`, and how a model is described by it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import nn

from trimtab.architectures import (
    gemma,
    gpt2,
    gpt_neox,
    llama,
    llama4,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_next,
    qwen_vl,
)
from trimtab.architectures._family import Family, Sizes, block_points
from trimtab.architectures._handle import Handle
from trimtab.architectures._map import ModelMap, global_handles, join
from trimtab.errors import BackendError
from trimtab.sites import Site

_MODULES = (
    qwen2, qwen3, qwen3_next, qwen_vl, llama, llama4, gemma, mistral, mixtral, phi3, olmo2, gpt2, gpt_neox
)  # fmt: skip
FAMILIES = MappingProxyType({kind: module.FAMILY for module in _MODULES for kind in module.FAMILY.model_types})


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text decoder.

    Raises:
        BackendError: the model carries no transformers configuration.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise BackendError(
            f"{type(model).__name__} has no transformers configuration; a causal language model was expected "
            "(any module can still be read by a site such as module:encoder.block.3.output)"
        )
    return config.get_text_config(decoder=True)


def by_table(model: nn.Module, family: Family) -> ModelMap:
    """Describe a model of a known family.

    Raises:
        BackendError: the class of the model does not have the family's modules.
    """
    config = text_config(model)
    text_path, text = _text_model(model, family)
    sizes, paths = Sizes.of(config), family.block(config)
    blocks_path = join(text_path, family.blocks)
    handles: dict[Site, Handle] = {}
    blocks = text.get_submodule(family.blocks)
    for layer, (name, block) in enumerate(blocks.named_children()):
        for point, where in block_points(block, paths, sizes).items():
            site = Site(point, layer=layer)
            handles[site] = Handle.of_point(site, join(blocks_path, name), where)
    ends = {"embed": join(text_path, family.embed), "final_norm": join(text_path, family.final_norm)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    handles.update(global_handles(model, sizes, ends, has_logits=head is not None))
    return ModelMap(
        family=family.name,
        model_type=config.model_type,
        fallback=False,
        steerable=True,
        num_layers=len(list(blocks.children())),
        sizes=sizes,
        text_path=text_path,
        blocks_path=blocks_path,
        numerics=family.numerics(config),
        definition=family,
        handles=MappingProxyType(handles),
        notes=(family.note,) if family.note else (),
    )


def _text_model(model: nn.Module, family: Family) -> tuple[str, nn.Module]:
    for path in family.text_paths:
        try:
            text = model.get_submodule(path)
            text.get_submodule(family.blocks), text.get_submodule(family.embed)
        except AttributeError:
            continue
        return path, text
    raise BackendError(
        f"{type(model).__name__} calls itself {family.name}, but none of "
        f"{', '.join(repr(path) for path in family.text_paths)} holds {family.blocks!r} and {family.embed!r}; "
        "load it with AutoModelForCausalLM or the family's own class"
    )
