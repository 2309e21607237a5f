"""Every error that Trimtab raises on purpose.

    TrimtabError
    |- InputError(ValueError)              what the caller gave cannot be used; exit code 2
    |  |- SiteError                        no such site; names the nearest
    |  |- VectorError                      a direction that is not finite, zero, of the wrong width or layer
    |  |- PositionError                    a position expression that cannot be read or met
    |  |- SteeringError                    ops, bounds or a steering file that make no sense together
    |  `- RecipeError                      a configuration with unknown keys or impossible values
    |- PrerequisiteError(ImportError)      an optional part is missing; the message holds the command that mends it
    |- TraceError(RuntimeError)            a trace cannot be read or written
    |  |- TraceExistsError                 the directory already holds a run
    |  |- TraceLockedError                 another process writes there
    |  |- TraceVersionError                written by a newer version
    |  |- TraceCorruptError                bytes do not match what was committed
    |  `- TraceWriteError                  a write failed: disk full, permission denied
    |- BackendError(RuntimeError)          a model cannot be loaded, hooked or run
    |  |- NotAppliedError                  an op was asked for and its site never ran
    |  |- UnfiredError                     an op ran and selected no row
    |  `- NonFiniteError                   a correction left the range of the model's dtype
    |- ComparisonError(RuntimeError)       two runs cannot be compared at all
    `- UnfinishedError(RuntimeError)       interrupted or incomplete; what was done is kept; exit code 3

User mistakes raise one of these; our own bugs raise `AssertionError` and keep their traceback. To add one, subclass
the nearest parent, keep it picklable (no custom `__init__`) and draw it above.
"""

from __future__ import annotations


class TrimtabError(Exception):
    """Base of all errors that Trimtab raises on purpose."""

    exit_code = 2


class InputError(TrimtabError, ValueError):
    """What the caller gave cannot be used."""


class SiteError(InputError):
    """No such site in this model or backend; the message names the nearest."""


class VectorError(InputError):
    """A direction that is not finite, zero, or does not fit the model."""


class PositionError(InputError):
    """A position expression that cannot be read, or that selects outside the prompt."""


class SteeringError(InputError):
    """Ops, bounds or a steering file that make no sense together."""


class RecipeError(InputError):
    """A configuration with unknown keys or impossible values."""


class PrerequisiteError(TrimtabError, ImportError):
    """An optional part is missing; the message holds the command that mends it."""


class TraceError(TrimtabError, RuntimeError):
    """A trace cannot be read or written."""


class TraceExistsError(TraceError):
    """The directory already holds a run."""


class TraceLockedError(TraceError):
    """Another process writes to this part of the trace."""


class TraceVersionError(TraceError):
    """The trace was written by a newer version of Trimtab."""


class TraceCorruptError(TraceError):
    """Bytes on disk do not match what was committed."""


class TraceWriteError(TraceError):
    """A write failed; what was committed before stays readable."""


class BackendError(TrimtabError, RuntimeError):
    """A model cannot be loaded, hooked or run."""


class NotAppliedError(BackendError):
    """An op was asked for and its site never ran."""


class UnfiredError(BackendError):
    """An op ran and selected no row."""


class NonFiniteError(BackendError):
    """A correction made the state non-finite or left the dtype's range."""


class ComparisonError(TrimtabError, RuntimeError):
    """Two runs cannot be compared at all."""


class UnfinishedError(TrimtabError, RuntimeError):
    """Interrupted or incomplete; what was done is kept and the run can be resumed."""

    exit_code = 3
