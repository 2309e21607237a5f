"""Examples through a model: one forward pass a batch, each site reduced where it lies; nothing is kept but one row.

Legend: B examples, S places (padded on the right, so that positions are those of the example alone), D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import BackendError, InputError, NonFiniteError, NotAppliedError
from trimtab.hooks import HookPoint, attach, module_handle
from trimtab.sites import Site, SitePattern, resolve_sites
from trimtab.vectors.data import Encoded

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Examples that run together."""

    members: tuple[int, ...]
    """Their places in the data."""
    ids: Tensor
    """int64 [B, S]."""
    attended: Tensor
    """bool [B, S]: not padding."""
    marked: Tensor
    """bool [B, S]: the tokens that count."""

    @property
    def padded(self) -> bool:
        """Whether any place is padding."""
        return not bool(self.attended.all())


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """What one site said of one batch."""

    rows: Tensor
    """float32 [B, D]: mean over the tokens of each example that count."""
    tokens: Tensor
    """float32 [B, S, K]: of every token its length, then its projection where a direction was given."""
    latents: Tensor | None = None
    """float32 [B, latents]: mean over the same tokens of what `transform` made of them."""


class Stream:
    """Runs examples through a model and hands on what its sites hold.

    Args:
        backend: a backend that owns its modules (Hugging Face).
        sites: site patterns, such as "layers.*.resid_post".
        batch_size: examples of one forward pass.

    Raises:
        InputError: a backend without modules of its own.
        SiteError: a site that this model does not have.
    """

    def __init__(self, backend: Any, sites: str | Sequence[str], *, batch_size: int = 8) -> None:
        if not hasattr(backend, "map") or not isinstance(getattr(backend, "model", None), nn.Module):
            raise InputError(f"the backend {backend.name!r} runs elsewhere; extraction reads modules: use backend 'hf'")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; at least 1 was expected")
        self.backend = backend
        self.model: nn.Module = backend.model
        self.batch_size = batch_size
        self.handles = _handles(backend, sites)
        self.device = torch.device(backend.info.device)
        self._last_only = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order of a forward pass."""
        return tuple(self.handles)

    def batches(self, encoded: Sequence[Encoded], units: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yield batches of examples of like length.

        Args:
            encoded: the examples.
            units: places in `encoded` that stay together and in order, such as the two sides of a pair.
        """
        ordered = sorted(units, key=lambda unit: max(len(encoded[index].ids) for index in unit))
        members: list[int] = []
        for number, unit in enumerate(ordered):
            members += unit
            if len(members) + len(unit) > self.batch_size or number == len(ordered) - 1:
                yield self._batch(encoded, tuple(members))
                members = []

    def _batch(self, encoded: Sequence[Encoded], members: tuple[int, ...]) -> Batch:
        width = max(len(encoded[index].ids) for index in members)
        filler = min(self.backend.eos_ids, default=0)
        ids, attended, marked = [], [], []
        for index in members:
            one = encoded[index]
            pad = width - len(one.ids)
            ids.append([*one.ids] + [filler] * pad)
            attended.append([True] * len(one.ids) + [False] * pad)
            marked.append([*one.mask] + [False] * pad)
        where = self.device
        return Batch(
            members=members,
            ids=torch.tensor(ids, device=where),
            attended=torch.tensor(attended, device=where),
            marked=torch.tensor(marked, device=where),
        )

    def forward(self, batch: Batch) -> None:
        """Run the model alone."""
        arguments: dict[str, Any] = {"use_cache": False}
        if batch.padded:
            arguments["attention_mask"] = batch.attended.long()
        if self._last_only:
            arguments["logits_to_keep"] = 1
        self.model(input_ids=batch.ids, **arguments)

    def run(
        self,
        batch: Batch,
        take: Callable[[Site, Pooled], None],
        *,
        along: Mapping[Site, Tensor] | None = None,
        transform: Transform | None = None,
    ) -> None:
        """Run one batch and hand on what each site holds of it, in the order of the forward pass.

        Args:
            batch: the examples.
            take: called once a site.
            along: site -> unit direction float32 [D], whose projection of every token is added to `Pooled.tokens`.
            transform: of a site's float32 tensor [B, S, D], pooled as well.

        Raises:
            NonFiniteError: a state is not finite; names site, example, position and token.
            NotAppliedError: a site never ran.
        """
        weights = batch.marked.float()
        weights = weights / weights.sum(dim=1, keepdim=True)
        held: dict[Site, Pooled] = {}
        visitors = [
            (handle, _Visit(site, batch, weights, held, None if along is None else along[site], transform))
            for site, handle in self.handles.items()
        ]
        with attach(self.model, visitors) as hooks:
            self.forward(batch)
        for site, calls in hooks.calls.items():
            if calls != 1:
                raise NotAppliedError(
                    f"{site} ran {calls} times in one forward pass; extraction needs a site that runs once"
                )
        sums = torch.stack([pooled.rows.sum() for pooled in held.values()])  # one look at the device a batch
        if not bool(torch.isfinite(sums).all()):
            self._locate(batch)
        for site, pooled in held.items():
            take(site, pooled)

    def _locate(self, batch: Batch) -> None:
        """Run a batch again to name the first state that is not finite."""
        found: list[tuple[Site, Tensor]] = []

        def look(site: Site) -> Callable[[Tensor], None]:
            def visit(x: Tensor) -> None:
                bad = ~torch.isfinite(x).all(dim=-1) & batch.attended
                if not found and bool(bad.any()):
                    found.append((site, bad))

            return visit

        with attach(self.model, [(handle, look(site)) for site, handle in self.handles.items()]):
            self.forward(batch)
        dtype = self.backend.info.dtype
        if not found:
            raise NonFiniteError(
                f"a mean over tokens left the range of float32 in a {dtype} model; load it in another dtype"
            )
        site, bad = found[0]
        row, position = bad.nonzero()[0].tolist()
        token = int(batch.ids[row, position])
        words = "" if self.backend.tokenizer is None else f" {self.backend.tokenizer.decode([token])!r}"
        raise NonFiniteError(
            f"{site}: the state of token {position}{words} (id {token}) of example {batch.members[row]} is not "
            f"finite in {dtype}; load the model in bfloat16 or float32"
        )


class _Visit:
    """Reduces the live tensor of one site."""

    __slots__ = ("along", "batch", "held", "site", "transform", "weights")

    def __init__(
        self,
        site: Site,
        batch: Batch,
        weights: Tensor,
        held: dict[Site, Pooled],
        along: Tensor | None,
        transform: Transform | None,
    ) -> None:
        self.site, self.batch, self.weights, self.held = site, batch, weights, held
        self.along, self.transform = along, transform

    def __call__(self, x: Tensor) -> None:
        if x.shape[:2] != self.weights.shape or x.ndim != 3:
            raise BackendError(
                f"{self.site}: a tensor of shape {list(x.shape)} passed; [{', '.join(map(str, self.weights.shape))}, "
                "width], one row a token, was expected"
            )
        wide = x.float()
        tokens = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        if self.along is not None:
            tokens = torch.cat((tokens, (wide @ self.along)[..., None]), dim=-1)
        rows = torch.bmm(self.weights[:, None], wide)[:, 0]
        latents = None
        if self.transform is not None:
            latents = torch.bmm(self.weights[:, None], self.transform(wide))[:, 0]
        self.held[self.site] = Pooled(rows=rows, tokens=tokens, latents=latents)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, without gradients or autocast, in full float32 products; then put all back."""
    training = [module for module in model.modules() if module.training]
    precision = torch.get_float32_matmul_precision()
    device = next(model.parameters()).device.type
    try:
        for module in training:
            module.training = False
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        for module in training:
            module.training = True


def _handles(backend: Any, sites: str | Sequence[str]) -> dict[Site, HookPoint]:
    words = sites.split() if isinstance(sites, str) else [str(one) for one in sites]
    if not words:
        raise InputError("sites is empty; at least one pattern was expected, such as layers.*.resid_post")
    patterns = [SitePattern.parse(word) for word in words]
    inner = [one for one in patterns if one.module is None]
    found = list(resolve_sites(inner, backend.map.num_layers, backend.map.points)) if inner else []
    found += [Site(one.point, module=one.module) for one in patterns if one.module is not None]
    return {
        site: backend.map.handle(site) if site.module is None else module_handle(backend.model, site)
        for site in sorted(dict.fromkeys(found), key=lambda site: site.sort_key)
    }
