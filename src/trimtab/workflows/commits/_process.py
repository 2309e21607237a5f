"""Run one command in a session of its own, for a limited time, and leave no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from trimtab._base.files import atomic_write_text

GRACE_SECONDS = 5.0
"""Between the request to end and the end by force."""
_OWNER = "owner.pid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a command ended."""

    exit_code: int | None
    """None when it could not start, or was ended by the time limit."""
    timed_out: bool
    seconds: float
    detail: str
    """One line about what went wrong; empty when nothing did."""


def run_command(
    words: Sequence[str], *, cwd: Path, environment: Mapping[str, str], logs: Path, name: str, time_limit: float
) -> Ended:
    """Run a command; its output goes to `logs/NAME.stdout` and `.stderr`.

    Every process that is left in its group is ended when it ends, when time is up, and when we are interrupted.

    Args:
        words: program and arguments.
        cwd: where it runs.
        environment: its whole environment.
        logs: an existing directory.
        name: of the log files.
        time_limit: seconds.
    """
    began = time.monotonic()
    error_log = logs / f"{name}.stderr"
    with (logs / f"{name}.stdout").open("wb") as out, error_log.open("wb") as err:
        try:
            process = subprocess.Popen(
                list(words),
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        except OSError as error:
            return Ended(exit_code=None, timed_out=False, seconds=0.0, detail=f"{words[0]}: {error.strerror}")
        atomic_write_text(logs / _OWNER, f"{process.pid}\n")
        timed_out = False
        try:
            process.wait(time_limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end_group(process)
    (logs / _OWNER).unlink(missing_ok=True)
    seconds = time.monotonic() - began
    if timed_out:
        return Ended(exit_code=None, timed_out=True, seconds=seconds, detail=f"over its time limit of {time_limit:g} s")
    code = process.returncode
    return Ended(exit_code=code, timed_out=False, seconds=seconds, detail=_why(code, error_log) if code else "")


def end_leftovers(logs: Path, mark: str) -> None:
    """End what an interrupted walk left running.

    Args:
        logs: the directory that it wrote to.
        mark: text that the environment of a process of ours holds; no other process is touched.
    """
    try:
        group = int((logs / _OWNER).read_text())
    except (OSError, ValueError):
        return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and mark in process.environ().values():
                process.kill()
    (logs / _OWNER).unlink(missing_ok=True)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, then make it; a group without members is what is hoped for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(code: int, log: Path) -> str:
    """The last line that it wrote to standard error, and how it ended."""
    ended = f"killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65536))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    return f"{ended}: {' '.join(lines[-1].split())[:300]}" if lines else f"{ended}, nothing on standard error"
