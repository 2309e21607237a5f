"""The state of a training run: parameters, gradients, buffers, optimizer, learning rates, random generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.dump._names import owned
from trimtab.dump._ranks import dims_text


class Item(NamedTuple):
    """One tensor of the state."""

    name: str
    tensor: Tensor
    kind: str
    dims: str | None = None


def params(model: nn.Module, prefix: str) -> Iterator[Item]:
    """Yield the parameters."""
    for name, tensor in owned(model, "_parameters"):
        yield Item(prefix + name, tensor, "param", _dims(model, tensor))


def buffers(model: nn.Module, prefix: str) -> Iterator[Item]:
    """Yield the buffers."""
    for name, tensor in owned(model, "_buffers"):
        yield Item(prefix + name, tensor, "value", None)


def param_grads(model: nn.Module, prefix: str) -> Iterator[Item]:
    """Yield the gradients of the parameters, Megatron's `main_grad` where there is one."""
    for name, tensor in owned(model, "_parameters"):
        gradient = getattr(tensor, "main_grad", None)
        gradient = tensor.grad if gradient is None else gradient
        if gradient is not None:
            yield Item(prefix + name, gradient, "grad", _dims(model, gradient))


def optimizer_state(optimizer: torch.optim.Optimizer, known: Mapping[int, tuple[str, nn.Module]]) -> Iterator[Item]:
    """Yield moments and other state by parameter; parameters that no model has are master weights.

    Args:
        optimizer: the optimizer.
        known: name and model of the parameters, by `id`.
    """
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name, model = known.get(id(parameter), (f"group{number}.{index}", None))
            if model is None:
                yield Item(f"{name}.master", parameter, "optim")
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, (Tensor, int, float)):
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                    yield Item(f"{name}.{key}", tensor, "optim", _dims(model, tensor))


def learning_rates(optimizer: torch.optim.Optimizer) -> Iterator[Item]:
    """Yield the learning rate of each group, in float64."""
    for number, group in enumerate(optimizer.param_groups):
        rate = torch.as_tensor(group["lr"], dtype=torch.float64)
        yield Item(f"lr.{number}", rate, "value")


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the settings of each parameter group, such as `{"group0": {"lr": 0.001, "eps": 1e-08}}`."""
    return {
        f"group{number}": {name: _plain(value) for name, value in group.items() if name != "params"}
        for number, group in enumerate(optimizer.param_groups)
    }


def _plain(value: Any) -> Any:
    """The value as JSON has it; what JSON does not know is told by its text."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def precision_settings() -> dict[str, Any]:
    """Return what decides the precision of a forward pass besides the dtypes of its tensors."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found: dict[str, Any] = {
        f"autocast_{kind}": str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
        if torch.is_autocast_enabled(kind)
        else "off"
        for kind in kinds
    }
    found["default_dtype"] = str(torch.get_default_dtype()).removeprefix("torch.")
    if torch.cuda.is_available():
        matmul = torch.backends.cuda.matmul
        found["tf32_matmul"], found["tf32_cudnn"] = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        found["bf16_reduced_precision_reduction"] = bool(matmul.allow_bf16_reduced_precision_reduction)
        found["fp16_reduced_precision_reduction"] = bool(matmul.allow_fp16_reduced_precision_reduction)
    return found


def random_state() -> Iterator[Item]:
    """Yield the states of the random generators of torch, Python and NumPy, without drawing from them."""
    yield Item("rng.cpu", torch.get_rng_state(), "value")
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield Item("rng.cuda", torch.cuda.get_rng_state(), "value")
    yield Item("rng.python", torch.tensor(random.getstate()[1], dtype=torch.int64), "value")
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        _, keys, position, _, _ = numpy.random.get_state()
        yield Item("rng.numpy", torch.tensor([*keys.tolist(), position], dtype=torch.int64), "value")


def _dims(model: nn.Module | None, tensor: Tensor) -> str | None:
    """DDP keeps whole copies in every process."""
    if type(model).__name__ != "DistributedDataParallel" or hasattr(tensor, "to_local"):
        return None
    return dims_text(tensor.ndim, {}, ["dp:replicated"])
