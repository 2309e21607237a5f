"""Traces in a temporary directory, written in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.trace import TokenRow, TraceWriter

Record = tuple[str, torch.Tensor, Mapping[str, Any]]


def token_rows(ids: Sequence[int], prompt_length: int, **fields: Any) -> list[TokenRow]:
    base = {"config": "", "prompt": 0, "request": "r0", "text": "", "logprob": None, "top_ids": (), "top_logprobs": ()}
    return [
        TokenRow(
            **{**base, **fields},
            position=position,
            token_id=token,
            generated=position >= prompt_length,
            stage="prefill" if position < prompt_length else "decode",
        )
        for position, token in enumerate(ids)
    ]


@pytest.fixture
def tokens() -> Callable[..., list[TokenRow]]:
    """Token rows of one request: ids, prompt length, other fields."""
    return token_rows


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a trace: name, records (name, tensor, fields), tokens; returns its path."""

    def make(name: str, records: Iterable[Record], tokens: Iterable[TokenRow] = (), **options: Any) -> Path:
        with TraceWriter(tmp_path / name, provenance={}, **options) as writer:
            for record, tensor, fields in records:
                writer.write(record, tensor, **fields)
            writer.write_tokens(list(tokens))
        return tmp_path / name

    return make


@pytest.fixture
def dump(write: Callable[..., Path]) -> Callable[..., Path]:
    """Write plain records at step 0: keyword = tensor."""

    def make(name: str, tensors: Mapping[str, torch.Tensor], step: int = 0, **options: Any) -> Path:
        return write(name, [(key, tensor, {"step": step}) for key, tensor in tensors.items()], **options)

    return make


@pytest.fixture
def generation(write: Callable[..., Path]) -> Callable[..., Path]:
    """Write a generation: {(site, prompt): rows}, cut into records of `cut` rows, with its token ids."""

    def make(
        name: str,
        rows: Mapping[tuple[str, int], torch.Tensor],
        ids: Mapping[int, Sequence[int]],
        *,
        prompt_length: int = 4,
        cut: int = 1000,
        **options: Any,
    ) -> Path:
        records = [
            (site, part, {"site": site, "prompt": prompt, "request": f"r{prompt}", "positions": positions})
            for (site, prompt), tensor in rows.items()
            for part, positions in zip(tensor.split(cut), torch.arange(len(tensor)).split(cut), strict=True)
        ]
        tokens = [
            row
            for prompt, tokens in ids.items()
            for row in token_rows(tokens, prompt_length, prompt=prompt, request=f"r{prompt}")
        ]
        return write(name, records, tokens, kind="generation", **options)

    return make
