"""Shards: masters, moments and gradients of which every process of the tokens keeps a part, by torch's FSDP2.

Of N processes each keeps the rows of one N-th of every parameter, in the storage dtype. For a batch the rows are
gathered, weights in the dtype of the products and everything else as it is stored; gradients are averaged in the wide
dtype, each process gets those of its own rows, and what was gathered is let go. The optimizer then moves rows, which is
all that Adam and the decoder's norm ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trimtab.sae.architectures import Terms, Weights
from trimtab.sae.precision import Precision

WEIGHTS = ("W_enc", "W_dec")
"""Parameters that matrix products are made with."""

Loss = Callable[[Weights], Terms]


class Shards:
    """This process's part of a learner's parameters.

    Args:
        whole: the parameters before they are shared out, stored dtype, device "meta": shapes and dtypes alone.
        mesh: of one dimension, the processes that share them.
        precision: of the learner.
        device: where the part lives.
    """

    def __init__(
        self, whole: Mapping[str, Tensor], mesh: DeviceMesh, precision: Precision, device: torch.device
    ) -> None:
        groups: dict[str, dict[str, Tensor]] = {}
        for name, one in whole.items():  # what is gathered together has one dtype; each weight has its own gathering
            groups.setdefault(name if name in WEIGHTS else str(one.dtype), {})[name] = one
        self._root = _Root(groups)
        for key, group in zip(groups, self._root.groups, strict=True):
            gathered = precision.compute if key in WEIGHTS else None
            policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=precision.wide, cast_forward_inputs=False)
            fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        fully_shard(self._root, mesh=mesh)
        self._root.to_empty(device=device)
        with torch.no_grad():
            self._root(lambda _: None)  # parts take their last place in memory at the first pass
        self._let_go()
        self._parameters = {name: cast(DTensor, one) for name, one in self._root.held().items()}
        self.own: dict[str, Tensor] = {
            name: cast(DTensor, one.detach()).to_local() for name, one in self._parameters.items()
        }
        """This process's rows; they are moved in place."""

    @contextmanager
    def gathered(self) -> Iterator[Weights]:
        """Gather the whole parameters for a while; they have no gradient, and every process must ask."""
        self._root.gather()
        try:
            held = {name: one.detach() for name, one in self._root.held().items()}
            yield Weights(held, {name: held[name] for name in WEIGHTS})
        finally:
            self._let_go()

    def differentiate(self, loss: Loss, factor: float) -> tuple[Terms, dict[str, Tensor]]:
        """Return the loss of this process's tokens, and the gradients of its rows, averaged over processes.

        Args:
            loss: computes the terms.
            factor: of the loss that is differentiated.
        """
        terms = self._root(loss)
        ((terms.recon + terms.sparsity + terms.aux) * factor).backward()
        gradients = {}
        for name, one in self._parameters.items():
            gradients[name] = (
                torch.zeros_like(self.own[name]) if one.grad is None else cast(DTensor, one.grad).to_local()
            )
            one.grad = None
        return terms, gradients

    def _let_go(self) -> None:
        for group in self._root.groups:
            cast(FSDPModule, group).reshard()


class _Group(nn.Module):
    """Parameters that are gathered together."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, one in parameters.items():
            self.register_parameter(name, nn.Parameter(one))


class _Root(nn.Module):
    """All groups; its forward pass is what FSDP2 follows."""

    def __init__(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(_Group(one) for one in groups.values())

    def held(self) -> dict[str, nn.Parameter]:
        """Return the parameters as they are now: parts, or gathered."""
        return {name: one for group in self.groups for name, one in group.named_parameters()}

    def gather(self) -> None:
        """Gather every group."""
        for group in self.groups:
            cast(FSDPModule, group).unshard()

    def forward(self, loss: Callable[[Weights], Any]) -> Any:
        """Compute a loss with the gathered parameters."""
        self.gather()
        held = self.held()
        return loss(Weights(held, {name: held[name].detach() for name in WEIGHTS}))
