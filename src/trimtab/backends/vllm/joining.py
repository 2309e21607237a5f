"""A pass over graphs that are compiled for the CPU: two taps, one call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

_VIEWS = frozenset((
    "view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t", "narrow",
    "split", "chunk", "unbind", "getitem", "expand", "expand_as", "contiguous", "to", "float", "type", "type_as",
    "detach",
))  # fmt: skip
"""Functions and methods that may return what they were given."""
_IN_PLACE = {operator.setitem} | {
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)
}


class Joining(CustomGraphPass):
    """Has each tap that joins the next one be done with it, in one call; not where its tensor is overwritten meanwhile.

    Args:
        site: the operator, of a tensor, the name of a tap, and the tensor of a tap that joins it.
        called: how graphs call it.
        joining: gives the names of taps that join the next one.
    """

    def __init__(self, site: Any, called: str, joining: Callable[[], Iterable[str]]) -> None:
        self._site, self._called, self._joining = site, called, joining

    def __call__(self, graph: Graph) -> None:
        """Change a graph of torch calls, in place."""
        names, first = set(self._joining()), None
        for node in graph.find_nodes(op="call_function", target=self._site):
            if first is not None:
                node.args = (*node.args, first.args[0])
                graph.erase_node(first)
                first = None  # it has one branch with it, and joins no other
            elif node.args[1] in names and not any(_overwritten(node.args[0], node)):
                first = node

    def uuid(self) -> tuple[str, ...]:
        """Return what decides how graphs come out, for Inductor's own cache."""
        return (self._called, *sorted(self._joining()))


def _overwritten(tensor: Node, tap: Node) -> Iterator[bool]:
    """Yield, of each use of a tensor but that by a tap, whether it may write to it."""
    for user in tensor.users:
        if user is not tap:
            yield _writes(user, tensor)
            if getattr(user.target, "__name__", user.target) in _VIEWS:
                yield from _overwritten(user, tap)


def _writes(user: Node, tensor: Node) -> bool:
    if user.op == "call_method":
        return str(user.target).endswith("_")
    target: Any = user.target
    asked = "out" in user.kwargs or any(one is True for one in (*user.args, user.kwargs.get("inplace")))
    if isinstance(target, torch._ops.HigherOrderOperator) or asked:
        return True
    if isinstance(target, torch._ops.OpOverload):
        if target._overloadname == "maybe_inplace":  # of vLLM: what it is given is its own
            return True
        taken = zip(target._schema.arguments, user.args, strict=False)
        named = ((one, user.kwargs.get(one.name)) for one in target._schema.arguments)
        return any(
            one.alias_info is not None and one.alias_info.is_write and given is tensor
            for one, given in (*taken, *named)
        )
    return target in _IN_PLACE or str(getattr(target, "__name__", "")).endswith("_")
