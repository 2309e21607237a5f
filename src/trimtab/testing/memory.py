"""A trace writer for tests."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class MemoryWriter:
    """A writer that keeps rows, tokens and doses in memory."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.records: list[SimpleNamespace] = []
        self.tokens: list[Any] = []
        self.doses: list[Any] = []
        self._fail_at = fail_at

    def write(self, name: str, tensor: Tensor, **fields: Any) -> int:
        """Keep a copy of a record."""
        if self._fail_at is not None and len(self.records) >= self._fail_at:
            raise RuntimeError("the writer fails on purpose")
        self.records.append(SimpleNamespace(name=name, tensor=tensor.clone(), **fields))
        return len(self.records) - 1

    def write_tokens(self, rows: Iterable[Any]) -> None:
        """Keep token rows."""
        self.tokens.extend(rows)

    def write_dose(self, rows: Iterable[Any]) -> None:
        """Keep dose rows."""
        self.doses.extend(rows)

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def edits(self, site: str, request: str) -> set[str]:
        """Return the states in which a site was recorded."""
        return {one.edit for one in self.records if one.site == site and one.request == request}

    def rows(self, site: str, request: str, edit: str | None = None) -> tuple[list[int], Tensor]:
        """Return positions and rows of a request at a site, in the order they were written."""
        mine = [
            one
            for one in self.records
            if one.site == site and one.request == request and (edit is None or one.edit == edit)
        ]
        assert mine, f"nothing was recorded at {site} for {request} ({edit})"
        return [place for one in mine for place in one.positions], torch.cat([one.tensor for one in mine])
