"""What the ops of a request did, as its answer says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from trimtab.backends.vllm.counts import OpReport
from trimtab.backends.vllm.reports import Report
from trimtab.steering import Positions


class Owner(NamedTuple):
    """Where one op of a plan comes from."""

    steering: str
    positions: Positions


Owners = dict[str, list[Owner]]


class Row(NamedTuple):
    """One op in one sequence."""

    site: str
    op: str
    steering: str
    rows: int
    nonfinite: int
    unfired: str | None
    """Why it changed no row; None when it changed some, or when the prefix cache held those that it had changed."""


@dataclass(slots=True)
class Ledger:
    """The doses of one HTTP request: of each prompt, and of each choice."""

    rows: list[Row] = field(default_factory=list)
    sequences: int = 0
    lost: int = 0

    def add(
        self, owners: Mapping[str, Sequence[Owner]], reports: Sequence[Report], prompt_ids: Sequence[int]
    ) -> list[Row]:
        """Take the reports of one engine request, and return them row by row."""
        new = [row for report in reports for row in _rows(owners, report, prompt_ids)]
        self.sequences += len(reports)
        self.rows += new
        return new

    def document(self, text: str, digest: str) -> dict[str, object]:
        """Return the `trimtab` field of an answer.

        Args:
            text: the steering as the request named it.
            digest: digest of what acted.
        """
        ops: dict[tuple[str, str, str], dict[str, object]] = {}
        unfired: dict[tuple[str, str, str, str], int] = {}
        for row in self.rows:
            entry = ops.setdefault(
                row[:3], {"site": row.site, "op": row.op, "steering": row.steering, "rows": 0, "nonfinite": 0}
            )
            entry["rows"] = int(str(entry["rows"])) + row.rows
            entry["nonfinite"] = int(str(entry["nonfinite"])) + row.nonfinite
            if row.unfired:
                key = (*row[:3], row.unfired)
                unfired[key] = unfired.get(key, 0) + 1
        return {
            "steering": text,
            "digest": digest,
            "sequences": self.sequences,
            "ops": list(ops.values()),
            "unfired": [
                {"site": site, "op": op, "steering": steering, "reason": reason, "sequences": count}
                for (site, op, steering, reason), count in unfired.items()
            ],
            "lost": self.lost,
        }


def _rows(owners: Mapping[str, Sequence[Owner]], report: Report, prompt_ids: Sequence[int]) -> Iterator[Row]:
    for one in report.ops:
        owner = owners[one.site][int(one.op.partition(":")[0])]
        why = None if one.rows else _why(owner.positions, one, report, prompt_ids)
        yield Row(one.site, one.op, owner.steering, one.rows, one.nonfinite, why)


def _why(positions: Positions, one: OpReport, report: Report, prompt_ids: Sequence[int]) -> str | None:
    """Say why an op changed no row."""
    if one.selected:
        return "not applied"
    cached = min(report.cached, len(prompt_ids))
    ids = torch.tensor(prompt_ids[:cached], dtype=torch.int64)
    if cached and bool(positions.mask(torch.arange(cached), report.prompt_length, ids).any()):
        return None
    return positions.unfired_reason(report.prompt_length, report.rows)
