"""Which decoder blocks ran: what the family's table says, compared with what a forward pass shows."""

from __future__ import annotations

import itertools
import re
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from trimtab.architectures import ModelMap
from trimtab.errors import BackendError

_OTHER_TOWERS = re.compile(r"vision|visual|audio|image|speech|projector|mtp|draft", re.IGNORECASE)


class BlockLists:
    """Watches the members of every module list during one forward pass, in a `with` block.

    The decoder blocks are the list whose members ran once each: one of the configured length, in a chain, with the most
    parameters, in this order. Nothing is taken from names, except that other towers are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self._length = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        self._lists = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and not _OTHER_TOWERS.search(path)
        }
        self._calls: dict[nn.Module, list[tuple[Tensor | None, Tensor | None]]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        members = {block for blocks in self._lists.values() for block in blocks}
        self._hooks = [block.register_forward_hook(self._see, with_kwargs=True) for block in members]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def check(self, sites: ModelMap) -> None:
        """Refuse a model that runs other blocks than its family's table says.

        Raises:
            BackendError: the message has both names.
        """
        ran = {path: blocks for path, blocks in self._lists.items() if self._once(blocks)}
        best = max(ran, key=lambda path: self._rank(ran[path]), default=None)
        if best == sites.blocks_path:
            return
        shown = f"{best} ({len(ran[best])} of them)" if best is not None else "in no list of modules that ran once each"
        raise BackendError(
            f"the table of the {sites.family} family has the decoder blocks in {sites.blocks_path} ({sites.num_layers} "
            f"of them), and a forward pass shows them in {shown}; load the family's own class, or give the model a "
            "config.model_type of its own, so that it is read by its structure"
        )

    def _see(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        made = output[0] if isinstance(output, (tuple, list)) and output else output
        self._calls.setdefault(block, []).append((_copy(given), _copy(made)))

    def _once(self, blocks: nn.ModuleList) -> bool:
        calls = [self._calls.get(block, []) for block in blocks]
        return all(len(one) == 1 and None not in one[0] for one in calls)

    def _rank(self, blocks: nn.ModuleList) -> tuple[bool, bool, int]:
        calls = [self._calls[block][0] for block in blocks]
        chained = all(_same(one[1], two[0]) for one, two in itertools.pairwise(calls))
        return len(blocks) == self._length, chained, sum(parameter.numel() for parameter in blocks.parameters())


def _copy(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else None


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and torch.equal(one, two)
