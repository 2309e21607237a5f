"""Traces: tensors recorded on disk with their identity, statistics and digest.

`TraceWriter` writes a run, `Trace` reads it, and the dumps of others too; `ls`, `show`, `estimate`,
`verify`, `repair`, `prune`, `import_dump` and `export_dump` are the verbs of `trimtab trace`.
The format is described in `docs/trace-format.md`.
"""

from __future__ import annotations

from trimtab.trace._fields import RecordFields
from trimtab.trace._format import FORMAT_VERSION, Level
from trimtab.trace._rows import Rows
from trimtab.trace.foreign.exporting import ExportResult, export_dump
from trimtab.trace.foreign.importing import ImportResult, import_dump
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
    "ExportResult",
    "ImportResult",
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
    "export_dump",
    "import_dump",
    "ls",
    "prune",
    "repair",
    "show",
    "verify",
]
