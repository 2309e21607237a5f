"""Traces: tensors recorded on disk with their identity, statistics and digest.

`TraceWriter` writes a run, `Trace` reads it; `ls`, `show`, `estimate`,
`verify`, `repair` and `prune` are the verbs of `trimtab trace`.
The format is described in `docs/trace-format.md`.
"""

from __future__ import annotations

from trimtab.trace._fields import RecordFields
from trimtab.trace._format import FORMAT_VERSION, Level
from trimtab.trace._rows import Rows
from trimtab.trace.inspect import (
    Estimate,
    Listing,
    RecordDetail,
    RecordGroup,
    estimate,
    ls,
    show,
)
from trimtab.trace.reader import RequestKey, Trace
from trimtab.trace.repair import CorruptRecord, PruneResult, RepairResult, VerifyResult, prune, repair, verify
from trimtab.trace.writer import DoseRow, NullWriter, TokenRow, TraceWriter, Writer

__all__ = [
    "FORMAT_VERSION",
    "CorruptRecord",
    "DoseRow",
    "Estimate",
    "Level",
    "Listing",
    "NullWriter",
    "PruneResult",
    "RecordDetail",
    "RecordFields",
    "RecordGroup",
    "RepairResult",
    "RequestKey",
    "Rows",
    "TokenRow",
    "Trace",
    "TraceWriter",
    "VerifyResult",
    "Writer",
    "estimate",
    "ls",
    "prune",
    "repair",
    "show",
    "verify",
]
