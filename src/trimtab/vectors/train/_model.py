"""A frozen model with trainable maps at its sites.

Nothing below the lowest site depends on what is trained. Those blocks run without a graph by themselves, because no
weight of theirs wants a gradient; what they hand up is kept per batch, and from then on they are passed over: the
blocks hand their input on and the topmost of them returns what was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab import hooks
from trimtab._base.log import get_logger
from trimtab.sites import Site
from trimtab.vectors.train._batches import Batch
from trimtab.vectors.train._maps import SiteMap, VectorMap
from trimtab.vectors.train.engine import Engine

_LOG = get_logger(__name__)


class Cache:
    """States below the lowest site, by batch, up to a number of bytes; one serves all trainings on the batches."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.hits = 0
        self._kept: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """Return what was kept, or None."""
        found = self._kept.get(key)
        self.hits += found is not None
        return found

    def put(self, key: str, value: Any) -> None:
        """Keep a block's output when there is room for it."""
        size = sum(one.numel() * one.element_size() for one in _tensors(value))
        if key not in self._kept and self.used + size <= self.limit:
            self._kept[key] = value
            self.used += size


class _Now(NamedTuple):
    rows: Tensor | None
    sign: Tensor | None


class SteeredModel:
    """The model, its maps and the blocks below them; use it inside `attached()`.

    Args:
        engine: the model.
        maps: site -> what is trained there.
        positions: rows that are steered.
        cache: where states below the lowest site are kept.
        checkpointing: run the blocks above again in the backward pass.
    """

    def __init__(
        self, engine: Engine, maps: Mapping[Site, SiteMap], *, positions: Any, cache: Cache, checkpointing: bool
    ) -> None:
        self._engine, self._maps, self._positions, self._cache = engine, dict(maps), positions, cache
        self._checkpointing = checkpointing
        self._now: _Now | None = None
        self._blocks: nn.ModuleList = engine.model.get_submodule(engine.map.blocks_path)  # type: ignore[assignment]
        self.below = _below(engine, min(maps, key=lambda site: site.sort_key))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Set the hooks, and the checkpoints where asked for; the weights are frozen inside."""
        visitors = [(self._engine.map.handle(site), self._visitor(one)) for site, one in self._maps.items()]
        with ExitStack() as stack:
            stack.enter_context(self._engine.frozen())
            stack.enter_context(hooks.attach(self._engine.model, visitors))
            if self._checkpointing:
                for block in list(self._blocks)[self.below :]:
                    stack.enter_context(_forward_replaced(block, _checkpointed(block.forward)))
            yield

    def logits(self, batch: Batch, *, steered: bool = True, sign: Tensor | None = None) -> Tensor:
        """Run a batch.

        Args:
            batch: micro-batch on the model's device.
            steered: whether the maps act.
            sign: [B, T, 1], factor of the corrections; None for 1.

        Returns:
            Logits [B, K, vocabulary] at the columns `batch.keep`, in the model's dtype.
        """
        self._now = _Now(batch.rows(self._positions), sign) if steered else None
        kept = self._cache.get(batch.key) if self.below and self._cache.limit else None
        with ExitStack() as stack:
            if kept is not None:
                for number, block in enumerate(list(self._blocks)[: self.below]):
                    skip = _hand_on if number < self.below - 1 else _always(kept)
                    stack.enter_context(_forward_replaced(block, skip))
            elif self.below and self._cache.limit:
                block = self._blocks[self.below - 1]
                stack.enter_context(_forward_replaced(block, self._recorded(block.forward, batch.key)))
            return self._forward(batch)

    def _forward(self, batch: Batch) -> Tensor:
        accepted = self._engine.parameters
        arguments: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
        if "position_ids" in accepted:
            arguments["position_ids"] = batch.positions
        keep = batch.keep
        cut = "logits_to_keep" in accepted
        if cut:
            arguments["logits_to_keep"] = keep
        found: Tensor = self._engine.model(**arguments).logits
        return found if cut else found[:, keep]

    def _recorded(self, forward: Callable[..., Any], key: str) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._cache.put(key, output)
            return output

        return record

    def _visitor(self, one: SiteMap) -> Callable[[Tensor], Tensor | None]:
        def visit(h: Tensor) -> Tensor | None:
            if self._now is None:
                return None
            rows, sign = self._now
            correction = one.vector.to(h.device) if isinstance(one, VectorMap) else one(h.float())
            if sign is not None:
                correction = sign.to(h.device) * correction
            changed = (h + correction).to(h.dtype)  # summed in float32, rounded once
            return changed if rows is None else torch.where(rows.to(h.device)[..., None], changed, h)

        return visit


def packing_works(engine: Engine, length: int = 6) -> bool:
    """Whether the model keeps two sequences in one row apart, by the positions alone: tried on a few tokens."""
    if "position_ids" not in engine.parameters:
        return False
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, engine.info.vocab_size, (1, 2 * length), generator=generator).to(engine.device)
    places = torch.arange(length, device=engine.device)
    with engine.frozen(), torch.no_grad():
        both = engine.model(input_ids=ids, position_ids=places.repeat(2)[None], use_cache=False).logits
        alone = engine.model(input_ids=ids[:, length:], position_ids=places[None], use_cache=False).logits
    error = (both[:, length:].double() - alone.double()).abs().max() / alone.double().abs().max()
    return bool(error < (1e-4 if both.dtype in (torch.float32, torch.float64) else 5e-2))


def _below(engine: Engine, lowest: Site) -> int:
    """Return how many blocks lie wholly below the lowest site."""
    if lowest.layer is None:
        return engine.map.num_layers if lowest.point in ("final_norm", "logits") else 0
    whole = engine.map.handle(lowest).module_path == f"{engine.map.blocks_path}.{lowest.layer}"
    return lowest.layer + (lowest.point == "resid_post" and whole)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")  # accelerate puts one there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _hand_on(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for one in value if isinstance(one, Tensor)] if isinstance(value, (tuple, list)) else []
