"""TraceSource: activations that a trace holds, request by request, or record by record where there are no positions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from trimtab.errors import InputError, TraceError
from trimtab.sae.data.chunk import UNKNOWN, Chunk, check_finite
from trimtab.trace import RequestKey, Trace

_Unit = RequestKey | tuple[int, ...]


class TraceSource:
    """Activations of a trace.

    Rows of a generation are read request by request, and the sites are joined by position. Records without positions (a
    training dump) are read in the order of writing, each as rows of its last dimension; token ids are unknown then.

    Args:
        trace: an open trace, or its directory.
        sites: site names, or names of records; the first is the input.
        special: ids of tokens that begin or pad a text.
        config: name of the configuration, when the trace holds several.
        edit: "none", "before" or "after", when it holds several.

    Raises:
        InputError: a site that the trace does not hold, or nothing to train on.
    """

    def __init__(
        self,
        trace: Trace | str | os.PathLike[str],
        sites: Sequence[str],
        *,
        special: frozenset[int] = frozenset(),
        config: str | None = None,
        edit: str | None = None,
    ) -> None:
        opened = trace if isinstance(trace, Trace) else Trace.open(trace)
        wanted = {name: value for name, value in (("config", config), ("edit", edit)) if value is not None}
        self._trace = opened.filter(**wanted) if wanted else opened
        self._sites = tuple(dict.fromkeys(sites))
        self._at = 0
        self.special, self.name = special, str(opened.path)
        if not self._sites:
            raise InputError(f"{self.name}: no site was given; it holds {', '.join(opened.sites()) or 'none'}")
        index = self._trace.index.filter(pl.col("kind") == "value")
        found = {site: index.filter((pl.col("site") == site) | (pl.col("name") == site)) for site in self._sites}
        for site, records in found.items():
            if not records.height:
                raise InputError(f"{self.name} holds no {site}; it holds {', '.join(self._trace.sites()) or 'no site'}")
        self._placed = all(records["positions"].null_count() == 0 for records in found.values())
        self._units = self._requests(found) if self._placed else self._records(found)
        self._widths = {site: int(records["shape"][0][-1]) for site, records in found.items()}
        self._tokens = self._token_ids() if self._placed else {}

    @property
    def widths(self) -> Mapping[str, int]:
        """Site -> width."""
        return self._widths

    def chunks(self) -> Iterator[Chunk]:
        """Yield a request, or a record of each site, at a time."""
        while self._at < len(self._units):
            unit = self._units[self._at]
            self._at += 1
            yield self._request(unit) if isinstance(unit, RequestKey) else self._record(unit)

    def state(self) -> dict[str, int]:
        """Return the cursor."""
        return {"unit": self._at}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Set the cursor."""
        self._at = state["unit"]

    def rewind(self) -> None:
        """Set the cursor to the first request."""
        self._at = 0

    def about(self) -> dict[str, Any]:
        """Return the trace, its sites and what tells it from another."""
        return {
            "kind": "trace",
            "path": self.name,
            "sites": list(self._sites),
            "widths": dict(self._widths),
            "units": len(self._units),
            "created": self._trace.manifest.get("created"),
        }

    def close(self) -> None:
        """Nothing to let go of."""

    def _requests(self, found: Mapping[str, pl.DataFrame]) -> list[_Unit]:
        names = list(RequestKey._fields)
        keys = [
            {RequestKey(*row) for row in one.select(names).unique().iter_rows()} for one in found.values()
        ]  # of each site
        common = set.intersection(*keys)
        ordered = [key for key in self._trace.requests() if key in common]
        if not ordered:
            raise InputError(f"{self.name}: no request has all of {', '.join(self._sites)}")
        return list(ordered)

    def _records(self, found: Mapping[str, pl.DataFrame]) -> list[_Unit]:
        ids = [one.sort("order")["record_id"].to_list() for one in found.values()]
        if len({len(one) for one in ids}) > 1:
            counts = ", ".join(f"{site}: {len(one)}" for site, one in zip(self._sites, ids, strict=True))
            raise InputError(f"{self.name}: the sites have different numbers of records ({counts}); equal ones join")
        return [tuple(row) for row in zip(*ids, strict=True)]

    def _token_ids(self) -> dict[RequestKey, tuple[Tensor, Tensor]]:
        """Request -> its positions, ascending, and their token ids."""
        names = list(RequestKey._fields)
        parts = self._trace.tokens.sort("position").partition_by(names, as_dict=True, maintain_order=True)
        return {
            RequestKey(*key): (
                torch.tensor(one["position"].to_list(), dtype=torch.int64),
                torch.tensor(one["token_id"].to_list(), dtype=torch.int64),
            )
            for key, one in parts.items()
        }

    def _request(self, key: RequestKey) -> Chunk:
        asked = {name: value for name, value in key._asdict().items() if value is not None}
        rows = {site: self._trace.rows(site=site, **asked) for site in self._sites}
        where = next(iter(rows.values())).positions
        for one in rows.values():
            where = where[torch.isin(where, one.positions)]
        tokens = self._look_up(key, where)
        values = {}
        for site, one in rows.items():
            values[site] = one.values[torch.searchsorted(one.positions, where)]

            def place(row: int, records: tuple[int, ...] = one.record_ids) -> str:
                listed = ", ".join(map(str, records[:4]))
                return f"record {listed}, position {int(where[row])} (token {int(tokens[row])})"

            check_finite(site, values[site], place)
        self._check_widths(values, f"request {key.request} of prompt {key.prompt}")
        return Chunk(values=values, tokens=tokens)

    def _look_up(self, key: RequestKey, where: Tensor) -> Tensor:
        positions, ids = self._tokens.get(key, (where[:0], where[:0]))
        if not len(positions):
            return torch.full_like(where, UNKNOWN)
        at = torch.searchsorted(positions, where).clamp(max=len(positions) - 1)
        return torch.where(positions[at] == where, ids[at], UNKNOWN)

    def _record(self, unit: tuple[int, ...]) -> Chunk:
        values = {}
        for site, record in zip(self._sites, unit, strict=True):
            tensor = self._trace.tensor(record)
            if not tensor.ndim or not tensor.dtype.is_floating_point:
                raise TraceError(
                    f"{self.name}: record {record} ({site}) is {tensor.dtype} of shape {list(tensor.shape)}; floats of "
                    "shape [..., width] were expected"
                )
            values[site] = tensor.reshape(-1, tensor.shape[-1])
            check_finite(site, values[site], _row_of(record))
        self._check_widths(values, f"records {', '.join(map(str, unit))}")
        rows = {len(one) for one in values.values()}
        if len(rows) > 1:
            raise InputError(f"{self.name}: records {unit} have {sorted(rows)} rows; equal numbers were expected")
        return Chunk(values=values, tokens=torch.full((rows.pop(),), UNKNOWN))

    def _check_widths(self, values: Mapping[str, Tensor], what: str) -> None:
        for site, one in values.items():
            if one.shape[-1] != self._widths[site]:
                raise InputError(
                    f"{self.name}: {what} at {site} has width {one.shape[-1]}; the first record has "
                    f"{self._widths[site]}"
                )


def _row_of(record: int) -> Callable[[int], str]:
    return lambda row: f"record {record}, row {row} (token unknown)"
