"""Files that are either whole or absent, names that cannot leave their directory, and locks between processes."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

from trimtab.errors import InputError, TraceLockedError

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file through a temporary neighbour, fsync and rename; readers see the old or the new file, whole."""
    target = Path(path)
    # Not tempfile: its files are readable by their owner alone, whatever the umask says.
    draft = target.with_name(f".{target.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with draft.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    fsync_directory(target.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write_bytes` for UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable (a no-op where directories cannot be opened)."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def safe_name(name: str, what: str = "name") -> str:
    """Return `name` if it can be one file's name anywhere.

    Raises:
        InputError: it is empty, too long, or holds a separator or other character outside A-Z a-z 0-9 . _ -
    """
    if not _SAFE.fullmatch(name) or ".." in name:
        raise InputError(f"{what} {name!r}: use 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit")
    return name


class FileLock:
    """An exclusive lock between processes, held through the operating system: a dead holder holds nothing.

    The file keeps the holder's process id for the error message; it is left in place on release.

    Raises:
        TraceLockedError: another process holds it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._handle: int | None = None

    def acquire(self) -> Self:
        """Take the lock or raise at once."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle)
        except OSError as error:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise TraceLockedError(
                f"{self.path.parent} is being written by process {holder}; wait for it, or write elsewhere"
            ) from error
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._handle = handle
        return self

    def release(self) -> None:
        """Give the lock back; releasing twice is harmless."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
