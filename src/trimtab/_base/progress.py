"""Progress of long work, on standard error, and silent where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

_HIDDEN: ContextVar[bool] = ContextVar("trimtab_progress_hidden", default=False)


class Progress(Protocol):
    """What long-running functions report to."""

    def advance(self, steps: float = 1) -> None:
        """Count finished steps."""

    def describe(self, text: str) -> None:
        """Say what is being done now."""


class _Silent:
    def advance(self, steps: float = 1) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


SILENT: Progress = _Silent()


@contextmanager
def hidden() -> Iterator[None]:
    """Show no progress of what runs within the block."""
    token = _HIDDEN.set(True)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


@contextmanager
def progress(description: str, total: float | None = None, *, show: bool | None = None) -> Iterator[Progress]:
    """Show a progress bar on standard error while the block runs.

    Args:
        description: what is being done, in a few words.
        total: number of steps; None shows a pulse.
        show: None shows it on a terminal only, and not within `hidden`.
    """
    if not (sys.stderr.isatty() and not _HIDDEN.get() if show is None else show):
        yield SILENT
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(description, total=total)

        class _Shown:
            def advance(self, steps: float = 1) -> None:
                bar.advance(task, steps)

            def describe(self, text: str) -> None:
                bar.update(task, description=text)

        yield _Shown()
