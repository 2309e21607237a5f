"""Where the rows of an evaluation come from: texts through a model, or a source such as a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Unpack

import torch
import xxhash
from torch import Tensor

from trimtab.backends import Backend, Capture, Request
from trimtab.errors import BackendError, InputError
from trimtab.sae.data import ActivationSource, Texts
from trimtab.sae.data.chunk import UNKNOWN, check_finite
from trimtab.trace import RecordFields

TENSOR_ROWS = 64
"""Rows of a bare tensor that count as one text: what is resampled together."""
FIRST = "first token of a text that begins every text"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """Rows of one text that count."""

    text: int
    x: Tensor
    """[rows, d_in], as it was in the model."""
    y: Tensor
    """[rows, d_out]; of an autoencoder the same tensor as `x`."""
    positions: tuple[int, ...]
    """Of the rows, in the text."""


def gathered(parts: Iterator[list[Part]], rows: int = 2048) -> Iterator[list[Part]]:
    """Yield the same parts, so many together that they have at least `rows` rows: products of few rows are slow."""
    held: list[Part] = []
    for some in parts:
        held += some
        if sum(len(part.x) for part in held) >= rows:
            yield held
            held = []
    if held:
        yield held


class EvaluationSet(Protocol):
    """A fixed set of activations that can be gone through again."""

    name: str
    left_out: Counter[str]

    @property
    def digest(self) -> str:
        """What tells this set from another; of a source, once it was gone through."""

    def parts(self, only: Collection[int] | None = None) -> Iterator[list[Part]]:
        """Yield the rows, some texts at a time; of `only` these texts, where they are given."""

    def words(self, text: int) -> Sequence[str]:
        """Return the tokens of a text; empty where they are not known."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Context:
    """One text as a model reads it."""

    ids: tuple[int, ...]
    skip: int
    """Tokens at its start that do not count."""

    @property
    def rows(self) -> int:
        """Tokens that count."""
        return len(self.ids) - self.skip


def contexts(backend: Backend, texts: Texts, *, start: int, tokens: int, max_length: int) -> list[Context]:
    """Cut texts to length until enough tokens are there; a token that begins every text does not count.

    Raises:
        InputError: no text is left, or none has two tokens that count.
    """
    begins = getattr(backend.tokenizer, "bos_token_id", None)
    found: list[Context] = []
    count = 0
    for text in texts.start(start):
        ids = backend.encode(text).ids[:max_length]
        skip = int(begins is not None and ids[0] == begins)
        if len(ids) - skip < 2:
            continue
        found.append(Context(ids=ids, skip=skip))
        count += len(ids) - skip
        if count >= tokens:
            break
    if not found:
        raise InputError(f"{texts.name} has no text of two tokens from number {start} on; give other texts")
    return found


class ModelSet:
    """Texts through a model, at one site, or at two for a transcoder."""

    def __init__(
        self, backend: Backend, texts: Texts, listed: Sequence[Context], site: str, target: str, *, batch: int = 8
    ) -> None:
        self.backend, self.contexts, self.site, self.target, self.batch = backend, list(listed), site, target, batch
        self.name = texts.name
        self.left_out = Counter({FIRST: sum(one.skip for one in listed)} if any(one.skip for one in listed) else {})
        info = backend.info
        hasher = xxhash.xxh3_128(f"{info.weights_digest}|{info.dtype}|{site}|{target}".encode())
        for one in listed:
            hasher.update(torch.tensor((len(one.ids), one.skip, *one.ids), dtype=torch.int64).numpy().tobytes())
        self._digest = f"xxh3:{hasher.hexdigest()}"

    @property
    def digest(self) -> str:
        """Digest of model, sites and token ids."""
        return self._digest

    def parts(self, only: Collection[int] | None = None) -> Iterator[list[Part]]:
        """Run batch after batch."""
        chosen = range(len(self.contexts)) if only is None else sorted(only)
        for at in range(0, len(chosen), self.batch):
            yield self._run(chosen[at : at + self.batch])

    def _run(self, texts: Sequence[int]) -> list[Part]:
        rows = RowKeeper()
        requests = [
            Request(prompt=self.contexts[text].ids, id=str(text), prompt_index=text, max_new_tokens=0) for text in texts
        ]
        sites = tuple(dict.fromkeys((self.site, self.target)))
        self.backend.generate(requests, capture=Capture(sites=sites), writer=rows)
        found = []
        for text in texts:
            context = self.contexts[text]
            kept = {site: rows.of(site, str(text))[context.skip :] for site in sites}
            for site, values in kept.items():
                if values.ndim != 2 or len(values) != context.rows:
                    raise BackendError(f"{site} gave rows of shape {[*values.shape]}; [{context.rows}, width] expected")
                check_finite(site, values, lambda row, text=text, skip=context.skip: self._place(text, skip + row))  # type: ignore[misc]
            where = tuple(range(context.skip, len(context.ids)))
            found.append(Part(text=text, x=kept[self.site], y=kept[self.target], positions=where))
        return found

    def _place(self, text: int, position: int) -> str:
        return f"text {text}, position {position} (token {self.words(text)[position]!r})"

    def words(self, text: int) -> Sequence[str]:
        """Return the tokens of a text."""
        ids, tokenizer = self.contexts[text].ids, self.backend.tokenizer
        return [str(one) if tokenizer is None else tokenizer.decode([one]) for one in ids]


class SourceSet:
    """What a source gives, a chunk at a time as one text; rows of tokens that begin or pad a text do not count."""

    def __init__(self, source: ActivationSource, site: str, target: str, tokens: int) -> None:
        for name in (site, target):
            if name not in source.widths:
                raise InputError(f"{source.name} gives {', '.join(source.widths)}; {name} was asked for")
        self._source, self._site, self._target, self._most = source, site, target, tokens
        self.name, self.left_out = source.name, Counter[str]()
        self._hasher = xxhash.xxh3_128(f"{site}|{target}".encode())
        self._seen = 0

    @property
    def digest(self) -> str:
        """Digest of the rows that were given so far."""
        return f"xxh3:{self._hasher.hexdigest()}"

    def parts(self, only: Collection[int] | None = None) -> Iterator[list[Part]]:
        """Go through the source from its beginning."""
        self._source.rewind()
        count, special = 0, torch.tensor(sorted(self._source.special), dtype=torch.int64)
        for text, chunk in enumerate(self._source.chunks()):
            keep = ~torch.isin(chunk.tokens, special)
            where = keep.nonzero()[: self._most - count, 0]
            count += len(where)
            part = Part(
                text=text,
                x=chunk.values[self._site][where],
                y=chunk.values[self._target][where],
                positions=tuple(where.tolist()),
            )
            if text >= self._seen:
                self._seen = text + 1
                self._hasher.update(part.x.contiguous().view(torch.uint8).numpy().tobytes())
                if not bool(keep.all()):
                    self.left_out["token that begins or pads a text"] += int((~keep).sum())
            if len(where) and (only is None or text in only):
                yield [part]
            if count >= self._most:
                return

    def words(self, text: int) -> Sequence[str]:
        """Return the tokens as numbers; none where the source does not know them."""
        self._source.rewind()
        for index, chunk in enumerate(self._source.chunks()):
            if index == text:
                return [] if bool((chunk.tokens == UNKNOWN).all()) else [str(one) for one in chunk.tokens.tolist()]
        return []


@dataclass(slots=True)
class RowKeeper:
    """A trace writer that keeps rows in memory, by site and request."""

    kept: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    count: int = 0

    def of(self, site: str, request: str) -> Tensor:
        """Return the rows of one request in the order of their positions, and forget them."""
        return torch.cat(self.kept.pop((site, request)))

    def write(self, name: str, tensor: Tensor, **fields: Unpack[RecordFields]) -> int:
        """Keep a copy: the backend may go on writing into the tensor."""
        self.kept.setdefault((name, str(fields.get("request"))), []).append(tensor.to("cpu", copy=True))
        self.count += 1
        return self.count - 1

    def write_tokens(self, rows: Any) -> None:
        """Keep nothing: the ids are known."""

    def write_dose(self, rows: Any) -> None:
        """Keep nothing: doses are not asked for."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
