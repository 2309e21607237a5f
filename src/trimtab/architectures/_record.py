"""One forward pass with what entered and left every module, for the structural probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], object]


@dataclass(slots=True)
class Call:
    """One call of one module: copies of the first tensor in and out, taken when they passed."""

    path: str
    module: nn.Module
    begin: int
    input: Tensor | None
    end: int = -1
    output: Tensor | None = None
    live: dict[str, tuple[Tensor, int]] = field(default_factory=dict, repr=False)
    """"input" and "output": the tensor itself with its version counter when it passed."""

    @property
    def leaf(self) -> bool:
        """Whether the module holds no other."""
        return next(self.module.children(), None) is None

    def mutated(self, side: str) -> bool:
        """Whether the framework wrote into the input or output after it had passed."""
        tensor, version = self.live[side]
        return tensor._version != version


def record(
    model: nn.Module, inputs: Mapping[str, Tensor], edits: Mapping[str, Edit] | None = None
) -> tuple[list[Call], Any]:
    """Run `model` once, in eval mode and without gradients.

    Args:
        model: its training mode is restored afterwards.
        inputs: keyword arguments.
        edits: module path -> function that changes the module's first input tensor in place.

    Returns:
        Every call in the order in which it began, and what the model returned.
    """
    calls: list[Call] = []
    clock = iter(range(2**62))
    removers = [
        remover
        for path, module in model.named_modules()
        for remover in _watch(path, module, calls, clock, (edits or {}).get(path))
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            output = model(**inputs, use_cache=False)
    finally:
        for remove in removers:
            remove()
        for module, training in modes.items():
            module.training = training
    return calls, output


def first_tensor(values: object) -> Tensor | None:
    """Return the first tensor of an output or an argument list; None when there is none."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, Mapping):
        values = tuple(values.values())
    if isinstance(values, (tuple, list)):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return None


def _watch(path: str, module: nn.Module, calls: list[Call], clock: Any, edit: Edit | None) -> Sequence[Any]:
    stack: list[Call] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = first_tensor(args)
        if tensor is None:
            tensor = first_tensor(kwargs.get("hidden_states"))
        if tensor is not None and edit is not None:
            edit(tensor)
        call = Call(path, module, next(clock), None if tensor is None else tensor.clone())
        if tensor is not None:
            call.live["input"] = (tensor, tensor._version)
        calls.append(call)
        stack.append(call)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = stack.pop()
        call.end = next(clock)
        tensor = first_tensor(output)
        if tensor is not None:
            call.output = tensor.clone()
            call.live["output"] = (tensor, tensor._version)

    pre = module.register_forward_pre_hook(begin, with_kwargs=True)
    return pre.remove, module.register_forward_hook(end).remove
