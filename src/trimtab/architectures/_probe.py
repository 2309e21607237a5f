"""Find the sites of a causal language model from its structure: one forward pass on random tokens.

Blocks are the one list of modules that ran once each, in a chain; contributions are the pair of a block's modules
that makes its output out of its input, bit for bit. Nothing is taken from the names of classes, except which of two
contributions is attention.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from trimtab._base.log import get_logger
from trimtab.architectures._family import Sizes
from trimtab.architectures._handle import Handle
from trimtab.architectures._map import ModelMap, global_handles
from trimtab.architectures._record import Call, record
from trimtab.architectures._registry import text_config
from trimtab.architectures._structure import Structure, explain, same, shaped
from trimtab.errors import BackendError
from trimtab.sites import LAYER_POINTS, Site

_OTHER_TOWERS = re.compile(r"vision|visual|audio|image|speech|projector|mtp|draft", re.IGNORECASE)
_log = get_logger(__name__)


def probe(model: nn.Module, *, allow_fallback: bool = False) -> ModelMap:
    """Describe a model by structure alone.

    Args:
        model: a transformers causal language model.
        allow_fallback: whether the map says that the model may be steered.

    Raises:
        BackendError: it cannot run on token ids, it has no list of blocks, or several streams.
    """
    config = text_config(model)
    sizes = Sizes.of(config)
    inputs = _tokens(model, sizes)
    calls, output = _run(model, inputs)
    blocks_path, blocks, chained = _find_blocks(model, calls, config)
    inside = {block.path: [call for call in calls if call.path.startswith(block.path + ".")] for block in blocks}
    scales = _scales(config)
    found = [explain(block, inside[block.path], sizes, scales) for block in blocks]
    found = _confirm_mid(model, inputs, blocks, found)
    handles, absent = _layer_handles(blocks, found)
    ends, notes = _ends(model, calls, blocks)
    handles.update(global_handles(model, sizes, ends, has_logits=hasattr(output, "logits")))
    if not chained:
        notes.append("the output of one block is not the input of the next: something is added between blocks")
    _log.info("%s: %d blocks at %s, found by structure", type(model).__name__, len(blocks), blocks_path)
    return ModelMap(
        family="structural",
        model_type=config.model_type,
        fallback=True,
        steerable=allow_fallback,
        num_layers=len(blocks),
        sizes=sizes,
        text_path=blocks_path.rpartition(".")[0],
        blocks_path=blocks_path,
        numerics=None,
        definition=None,
        handles=MappingProxyType(handles),
        absent=MappingProxyType(absent),
        notes=tuple(notes),
    )


def _tokens(model: nn.Module, sizes: Sizes) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, min(sizes.vocab, 100), (2, 7), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Call], Any]:
    try:
        return record(model, inputs)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise BackendError(
            f"{type(model).__name__} could not be probed: a forward pass on random token ids failed with "
            f"{type(error).__name__}: {error}; only causal language models that take input_ids can be described"
        ) from error


def _find_blocks(model: nn.Module, calls: Sequence[Call], config: Any) -> tuple[str, list[Call], bool]:
    """The list of decoder blocks: of the configured length, chained, with the most parameters."""
    by_path: dict[str, list[Call]] = {}
    for call in calls:
        by_path.setdefault(call.path, []).append(call)
    candidates = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or _OTHER_TOWERS.search(path):
            continue
        runs = [by_path.get(f"{path}.{name}", []) for name, _ in module.named_children()]
        if any(len(run) != 1 for run in runs) or any(run[0].input is None or run[0].output is None for run in runs):
            continue
        blocks = [run[0] for run in runs]
        rank = (
            len(blocks) == getattr(config, "num_hidden_layers", None),
            _chained(blocks),
            sum(parameter.numel() for parameter in module.parameters()),
        )
        candidates.append((rank, path, blocks))
    if not candidates:
        raise BackendError(
            f"{type(model).__name__} (model type {config.model_type!r}) has no list of decoder blocks that each run "
            "once per forward pass; read it through module:<path>.output sites"
        )
    rank, path, blocks = max(candidates, key=lambda candidate: candidate[0])
    shape = blocks[0].output.shape if blocks[0].output is not None else ()
    if len(shape) != 3:
        raise BackendError(
            f"{type(model).__name__}: its blocks pass on a tensor of shape {tuple(shape)}, several streams instead of "
            "one [batch, sequence, width]; a direction has no meaning there; read it through module:<path>.output sites"
        )
    return path, blocks, rank[1]


def _chained(blocks: Sequence[Call]) -> bool:
    return all(
        one.output is not None and two.input is not None and torch.equal(one.output, two.input)
        for one, two in itertools.pairwise(blocks)
    )


def _scales(config: Any) -> list[float]:
    """Numbers of the configuration that could be a residual multiplier."""
    values = config.to_dict()
    return sorted({float(v) for v in values.values() if isinstance(v, float) and 0.0 < v < 64.0 and v != 1.0})


def _confirm_mid(
    model: nn.Module, inputs: dict[str, Tensor], blocks: Sequence[Call], found: list[Structure]
) -> list[Structure]:
    """Drop resid_mid where a write into the tensor does not reach the block's output.

    A block may keep its own copy of the stream; then the in-place write would steer the MLP branch alone.
    """
    edits = {
        f"{block.path}.{structure.points['resid_mid'].path}": lambda x: x.mul_(0.75)
        for block, structure in zip(blocks, found, strict=True)
        if "resid_mid" in structure.points
    }
    if not edits:
        return found
    calls, _ = record(model, inputs, edits)
    last = {call.path: call for call in calls}
    confirmed = []
    for block, structure in zip(blocks, found, strict=True):
        if "resid_mid" in structure.points and not _reaches(block.path, structure, last):
            points = {name: point for name, point in structure.points.items() if name != "resid_mid"}
            why = "a write into the tensor that enters its MLP does not reach the stream; use attn_out or mlp_out"
            structure = Structure(points=points, missing={**structure.missing, "resid_mid": why})
        confirmed.append(structure)
    return confirmed


def _reaches(block: str, structure: Structure, last: dict[str, Call]) -> bool:
    mid, post = last[f"{block}.{structure.points['resid_mid'].path}"].input, last[block].output
    mlp = structure.points["mlp_out"]
    assert mid is not None and post is not None
    return same(mid + shaped(last[f"{block}.{mlp.path}"], mid) * mlp.scale, post)


def _layer_handles(blocks: Sequence[Call], found: Sequence[Structure]) -> tuple[dict[Site, Handle], dict[Site, str]]:
    handles, absent = {}, {}
    for layer, (block, structure) in enumerate(zip(blocks, found, strict=True)):
        for point in LAYER_POINTS:
            site = Site(point, layer=layer)
            if point in structure.points:
                handles[site] = Handle.of_point(site, block.path, structure.points[point])
            else:
                absent[site] = structure.missing.get(point, "no module that gives it was found by structure")
    return handles, absent


def _ends(model: nn.Module, calls: Sequence[Call], blocks: Sequence[Call]) -> tuple[dict[str, str | None], list[str]]:
    """Paths of the embedding and the final norm, and what is remarkable about them."""
    notes = []
    paths: dict[str, str | None] = {"embed": None, "final_norm": None}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    for call in calls:
        if call.module is embedding:
            paths["embed"] = call.path
            if call.output is None or not torch.equal(call.output, blocks[0].input):  # type: ignore[arg-type]
                notes.append("something acts between embed and layers.0.resid_pre (a factor, positions or a norm)")
            break
    head = getattr(model, "get_output_embeddings", lambda: None)()
    into_head = next((call.input for call in calls if call.module is head and call.input is not None), None)
    for call in calls:
        after = call.leaf and call.begin > blocks[-1].end and call.output is not None and call.module is not head
        if after and (into_head is None or torch.equal(call.output[:, -1:], into_head[:, -1:])):  # type: ignore[index]
            paths["final_norm"] = call.path
            break
    return paths, notes
