"""ModelSource: activations of a model that runs while the autoencoder trains, on any backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from trimtab.backends import Backend, Capture, Request
from trimtab.errors import BackendError, InputError
from trimtab.sae.data.chunk import Chunk, check_finite
from trimtab.sae.data.texts import Texts
from trimtab.sites import Site, SitePattern, resolve_sites
from trimtab.trace import DoseRow, RecordFields, TokenRow


class ModelSource:
    """Activations of texts, run through a model in contexts of bounded length.

    A text that is longer than a context goes on in the next one, which begins with the token that begins a text, if the
    tokenizer has one. A batch of contexts is one chunk, so equal arguments run equal batches and give equal bits.

    Args:
        backend: an open backend (`open_backend`); closed with this source.
        texts: what is run.
        sites: site names; the first is the input.
        context_size: tokens of a context at most.
        batch_size: contexts of a chunk.
        shard: (rank, ranks): of all batches this source runs every `ranks`-th.

    Raises:
        InputError: sizes that make no sense.
        SiteError: a site that this model does not have.
    """

    def __init__(
        self,
        backend: Backend,
        texts: Texts,
        sites: Sequence[str],
        *,
        context_size: int = 128,
        batch_size: int = 16,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if context_size < 2 or batch_size < 1:
            raise InputError(
                f"contexts of {context_size} tokens, {batch_size} a batch; at least 2 tokens, 1 context were expected"
            )
        longest = backend.info.max_positions
        if longest is not None and context_size > longest:
            raise InputError(f"context_size is {context_size}; {backend.model_id} has {longest} positions")
        self._backend, self._texts = backend, texts
        self._sites = tuple(_sites(backend, sites))
        self._size, self._batch, self._shard = context_size, batch_size, shard
        self._text = self._window = self._number = 0
        self._widths: dict[str, int] = {}
        self.special = _special(backend.tokenizer)
        self.name = f"{backend.model_id} on {texts.name}"

    @property
    def widths(self) -> Mapping[str, int]:
        """Site -> width; a site whose width no table gives is found by running one token."""
        if not self._widths:
            probe = self._run([(0,)])
            self._widths = {site: one.shape[1] for site, one in probe.items()}
        return self._widths

    def chunks(self) -> Iterator[Chunk]:
        """Run batch after batch."""
        rank, ranks = self._shard
        contexts = self._contexts()
        while batch := [context for _, context in zip(range(self._batch), contexts, strict=False)]:
            number = self._number
            self._number += 1
            if number % ranks == rank:
                yield self._chunk(batch, number)

    def state(self) -> dict[str, int]:
        """Return the next text and window, and the number of batches before it."""
        return {"text": self._text, "window": self._window, "batch": self._number}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Set the cursor."""
        self._text, self._window, self._number = state["text"], state["window"], state["batch"]

    def rewind(self) -> None:
        """Begin with the first text."""
        self._text = self._window = self._number = 0

    def about(self) -> dict[str, Any]:
        """Return model, texts and how they are cut."""
        info = self._backend.info
        return {
            "kind": "model",
            "model": self._backend.model_id,
            "backend": self._backend.name,
            "dtype": info.dtype,
            "weights_digest": info.weights_digest,
            "texts": self._texts.name,
            "sites": list(self._sites),
            "context_size": self._size,
            "batch_size": self._batch,
            "shard": list(self._shard),
        }

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    def _contexts(self) -> Iterator[tuple[int, ...]]:
        """Yield contexts from the cursor on; it stands behind a context when that is given out."""
        texts = self._texts.start(self._text)
        for text in texts:
            windows = self._windows(text)
            while self._window < len(windows):
                self._window += 1
                context = windows[self._window - 1]
                if self._window == len(windows):
                    self._text, self._window = self._text + 1, 0
                    yield context
                    break
                yield context

    def _windows(self, text: str) -> list[tuple[int, ...]]:
        ids = self._backend.encode(text).ids
        begins = ids[:1] if ids[0] in self.special else ()
        body, step = ids[len(begins) :], self._size - len(begins)
        return [(*begins, *body[at : at + step]) for at in range(0, max(len(body), 1), step)]

    def _chunk(self, batch: Sequence[tuple[int, ...]], number: int) -> Chunk:
        tokens = torch.tensor([token for context in batch for token in context])
        values = self._run(batch)
        for site, one in values.items():
            if len(one) != len(tokens):
                raise BackendError(f"{site} gave {len(one)} rows for {len(tokens)} tokens; one a token was expected")
            check_finite(site, one, lambda row: _place(batch, number, row, self._backend.tokenizer))
        return Chunk(values=values, tokens=tokens)

    def _run(self, batch: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        rows = _Rows(len(batch))
        requests = [Request(prompt=ids, prompt_index=n, max_new_tokens=0) for n, ids in enumerate(batch)]
        self._backend.generate(requests, capture=Capture(sites=self._sites), writer=rows)
        return {site: rows.of(site) for site in self._sites}


class _Rows:
    """A trace writer that keeps the rows of each site and request in memory."""

    def __init__(self, requests: int) -> None:
        self._parts: dict[str, list[list[Tensor]]] = {}
        self._requests, self._count = requests, 0

    def of(self, site: str) -> Tensor:
        """Return the rows of a site, request after request."""
        return torch.cat([part for parts in self._parts[site] for part in parts])

    def write(self, name: str, tensor: Tensor, **fields: Unpack[RecordFields]) -> int:
        """Keep a copy: the backend may go on writing into the tensor."""
        prompt = fields.get("prompt")
        assert prompt is not None
        self._parts.setdefault(name, [[] for _ in range(self._requests)])[prompt].append(tensor.to("cpu", copy=True))
        self._count += 1
        return self._count - 1

    def write_tokens(self, rows: Iterable[TokenRow]) -> None:
        """Keep nothing: the ids are known."""

    def write_dose(self, rows: Iterable[DoseRow]) -> None:
        """Keep nothing: nothing is steered."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _sites(backend: Backend, sites: Sequence[str]) -> list[str]:
    """Resolve patterns against the backend's own sites, in the order in which they were given."""
    known = backend.sites()

    def points(layer: int) -> list[str]:
        return [site.point for site in known if site.layer == layer]

    found: list[Site] = []
    for text in sites:
        pattern = SitePattern.parse(text)
        if pattern.module is not None:
            found.append(Site(pattern.point, module=pattern.module))
            continue
        found += resolve_sites([pattern], backend.info.num_layers, points)
    if not found:
        raise InputError("no site was given; name at least one, such as layers.3.resid_post")
    return list(dict.fromkeys(map(str, found)))


def _special(tokenizer: Any) -> frozenset[int]:
    names = ("bos_token_id", "cls_token_id", "pad_token_id")
    return frozenset(one for name in names if (one := getattr(tokenizer, name, None)) is not None)


def _place(batch: Sequence[tuple[int, ...]], number: int, row: int, tokenizer: Any) -> str:
    for index, context in enumerate(batch):
        if row < len(context):
            words = "" if tokenizer is None else f" {tokenizer.decode([context[row]])!r}"
            return f"batch {number}, context {index}, position {row} (token {context[row]}{words})"
        row -= len(context)
    raise AssertionError("a row beyond the batch")
