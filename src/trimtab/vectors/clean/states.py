"""Pooled states of texts: the mean over the tokens that count, of the unsteered model, one row per text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
import torch

from trimtab.backends import Backend, Capture, Request
from trimtab.errors import InputError
from trimtab.sites import Site
from trimtab.steering import Steering
from trimtab.trace import DoseRow, RecordFields, TokenRow
from trimtab.vectors.clean.linear import Matrix
from trimtab.vectors.data import Encoder, Example, Pool


def pooled_states(
    backend: Backend,
    examples: Sequence[Example],
    sites: Sequence[Site],
    *,
    pool: Pool = "assistant",
    steering: Steering | None = None,
    what: str = "",
) -> dict[Site, Matrix]:
    """Run texts and return, per site, their mean states [n, d] in float64.

    A state is read after the ops of its site, so that what a steering does there is in it.

    Args:
        backend: the model.
        examples: texts or conversations.
        sites: where.
        pool: which tokens count.
        steering: for states of a steered model; the cleaning uses those of the unsteered one.
        what: whose texts these are, for messages.

    Raises:
        InputError: fewer than two texts, or a site that gave no state; names both.
    """
    if len(examples) < 2:
        raise InputError(f"{what or 'states'}: {len(examples)} texts were given; at least two activations are needed")
    encoder = Encoder(tokenizer=backend.tokenizer, pool=pool)
    encoded = [encoder(one) for one in examples]
    requests = [
        Request(prompt=one.ids, id=str(index), steering=steering, max_new_tokens=0) for index, one in enumerate(encoded)
    ]
    means = _Means({str(index): one.mask for index, one in enumerate(encoded)})
    capture = Capture(sites=tuple(map(str, sites)), edit=("after",))
    backend.generate(requests, capture=capture, writer=means)
    return {site: means.matrix(site, len(requests), what) for site in sites}


class _Means:
    """A writer that keeps, per site and text, the sum of the states that count."""

    def __init__(self, masks: dict[str, tuple[bool, ...]]) -> None:
        self._masks = {name: np.array(mask) for name, mask in masks.items()}
        self._sums: dict[str, dict[str, Any]] = defaultdict(dict)
        self._count = 0

    def write(self, name: str, tensor: torch.Tensor, **fields: Unpack[RecordFields]) -> int:
        text, site = str(fields["request"]), str(fields["site"])
        places = np.asarray(fields["positions"])
        wanted = torch.from_numpy(self._masks[text][places])
        total = tensor[wanted].double().sum(dim=0).numpy()
        held = self._sums[site]
        held[text] = held.get(text, 0.0) + total
        self._count += 1
        return self._count - 1

    def matrix(self, site: Site, count: int, what: str) -> Matrix:
        found = self._sums[str(site)]
        if len(found) < count:
            raise InputError(
                f"{what or 'states'}: {len(found)} of {count} texts gave a state at {site}; check the site"
            )
        rows = [found[str(index)] / self._masks[str(index)].sum() for index in range(count)]
        matrix: Matrix = np.stack(rows)
        bad = ~np.isfinite(matrix).all(axis=1)
        if bad.any():
            raise InputError(
                f"{what or 'states'}: the state of text {int(bad.argmax())} at {site} is not finite; use "
                "float32 or bfloat16"
            )
        return matrix

    def write_tokens(self, rows: Iterable[TokenRow]) -> None:
        pass

    def write_dose(self, rows: Iterable[DoseRow]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
