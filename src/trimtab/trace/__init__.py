"""Traces: tensors recorded on disk with their identity, statistics and digest.

`TraceWriter` writes a run, `Trace` reads it; `repair`, `verify` and `prune` work on what lies on disk.
The format is described in `docs/trace-format.md`.
"""

from __future__ import annotations

from trimtab.trace._fields import RecordFields
from trimtab.trace._format import FORMAT_VERSION, Level
from trimtab.trace._rows import Rows
from trimtab.trace.reader import RequestKey, Trace
from trimtab.trace.repair import CorruptRecord, PruneResult, RepairResult, VerifyResult, prune, repair, verify
from trimtab.trace.writer import DoseRow, NullWriter, TokenRow, TraceWriter, Writer

__all__ = [
    "FORMAT_VERSION",
    "CorruptRecord",
    "DoseRow",
    "Level",
    "NullWriter",
    "PruneResult",
    "RecordFields",
    "RepairResult",
    "RequestKey",
    "Rows",
    "TokenRow",
    "Trace",
    "TraceWriter",
    "VerifyResult",
    "Writer",
    "prune",
    "repair",
    "verify",
]
