"""A model run with one block's input replaced, recording what its modules really computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import architectures, hooks


def watch(model: nn.Module, layer: int, rows: Tensor) -> dict[str, Tensor]:
    """Run the whole model with `rows` [batch, sequence, d] as the input of a block.

    Returns:
        The block's sites, and "logits" [batch, head, query, key]: what its attention gave to the softmax.
    """
    model.set_attn_implementation("eager")
    model_map = architectures.describe(model)
    block = model.get_submodule(model_map.blocks_path)[layer]
    seen: dict[str, Tensor] = {}

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rows.to(args[0]), *args[1:])

    def keep(name: str) -> Any:
        return lambda x: seen.__setitem__(name, x.clone())

    sites = [site for site in model_map.sites() if site.layer == layer and site.point != "resid_pre"]
    handle = block.register_forward_pre_hook(replace)
    ids = torch.full(rows.shape[:2], 20)
    try:
        visitors = [(model_map.handle(site), keep(site.point)) for site in sites]
        with hooks.attach(model, visitors), _softmax_of(block, seen), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen


@contextmanager
def _softmax_of(block: nn.Module, seen: dict[str, Tensor]) -> Iterator[None]:
    """Record the four-dimensional tensor that enters a softmax while the block runs."""
    original = torch.nn.functional.softmax
    running = []

    def spy(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if running and x.ndim == 4:
            assert "logits" not in seen
            seen["logits"] = x.clone()
        return original(x, *args, **kwargs)

    handles = (
        block.register_forward_pre_hook(lambda module, args: running.append(True)),
        block.register_forward_hook(lambda module, args, output: running.clear()),
    )
    torch.nn.functional.softmax = spy
    try:
        yield
    finally:
        torch.nn.functional.softmax = original
        for handle in handles:
            handle.remove()
