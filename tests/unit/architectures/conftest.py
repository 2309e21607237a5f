"""Tiny models, each built once, and a forward pass that records chosen sites."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.unit.every_family import pytest_generate_tests  # noqa: F401
from trimtab import architectures, hooks
from trimtab.architectures import ModelMap
from trimtab.sites import Site
from trimtab.testing.models import tiny


@functools.cache
def _built(family: str, dtype: torch.dtype) -> tuple[nn.Module, ModelMap]:
    model = tiny(family, dtype=dtype)
    return model, architectures.describe(model)


@functools.cache
def _probed(family: str, dtype: torch.dtype) -> ModelMap:
    return architectures.probe(_built(family, dtype)[0])


def _tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(8, 104, (batch, length), generator=torch.Generator().manual_seed(3))


def _capture(
    model: nn.Module, model_map: ModelMap, sites: Iterable[Site | str] | None = None, ids: Tensor | None = None
) -> dict[str, Tensor]:
    """Clones of the sites' tensors in one forward pass, and the result under "result"."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def visit(x: Tensor) -> None:
            seen[name] = x.clone()

        return visit

    wanted = [str(site) for site in (model_map.sites() if sites is None else sites)]
    with hooks.attach(model, [(model_map.handle(site), keep(site)) for site in wanted]), torch.no_grad():
        seen["result"] = model(input_ids=_tokens() if ids is None else ids, use_cache=False).logits
    return seen


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """`built(family, dtype)`, `probed(family, dtype)`, `tokens()`, `capture(model, map, sites)`."""
    return SimpleNamespace(built=_built, probed=_probed, tokens=_tokens, capture=_capture)
