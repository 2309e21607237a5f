"""Where a trace lies: a local directory, or any fsspec URL, behind one small interface.

On a local disk a file appears by rename after its bytes were synced. Object stores have no rename and need none: an
object exists when its upload ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from trimtab._base.files import FileLock, fsync_directory
from trimtab.errors import InputError, TraceError, TraceLockedError, TraceWriteError

Chunk = Any  # whatever has the buffer protocol: bytes, memoryview, ctypes arrays


class Lock(Protocol):
    """A held lock."""

    def release(self) -> None:
        """Give it back; twice is harmless."""


class Store(Protocol):
    """Files of one run; names are relative, with forward slashes."""

    root: str
    local: bool

    def names(self, folder: str) -> list[str]:
        """Return the entries of a folder, without its path; empty when the folder does not exist."""

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None when there is none."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes `[start, stop)` of a file."""

    def map(self, name: str) -> mmap.mmap | None:
        """Map a file into memory (copy on write); None where files cannot be mapped."""

    def put(self, name: str, chunks: Iterable[Chunk]) -> int:
        """Write a file whole or not at all, durable when this returns; return its size."""

    def put_new(self, name: str, data: bytes) -> bool:
        """`put` unless the file exists; return whether it was written."""

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""

    def make(self, folder: str) -> None:
        """Create a folder and its parents."""

    def lock(self, name: str) -> Lock:
        """Take the writer's lock or raise `TraceLockedError`."""

    def locked_by(self, name: str) -> str | None:
        """Return who holds the lock, or None."""

    def free(self) -> int | None:
        """Return the free space in bytes, or None when it is not known."""


def open_store(path: str | os.PathLike[str]) -> Store:
    """Return the store for a local path or an fsspec URL such as `s3://bucket/run` or `memory://run`.

    Raises:
        InputError: an unknown protocol, or one whose package is missing.
    """
    text = os.fspath(path)
    protocol, found, rest = text.partition("://")
    if not found:
        return LocalStore(Path(text))
    if protocol == "file":
        return LocalStore(Path(rest))
    return RemoteStore(text)


class LocalStore:
    """A directory."""

    local = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self.root = str(root)

    def names(self, folder: str) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self._root / folder)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int | None:
        try:
            return (self._root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with (self._root / name).open("rb") as stream:
            stream.seek(start)
            return stream.read(-1 if stop is None else stop - start)

    def map(self, name: str) -> mmap.mmap | None:
        with (self._root / name).open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def put(self, name: str, chunks: Iterable[Chunk]) -> int:
        target = self._root / name
        temporary = self._temporary(target)
        try:
            size = self._fill(temporary, chunks)
            temporary.replace(target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise write_error(self, name, error) from error
            raise
        fsync_directory(target.parent)
        return size

    def put_new(self, name: str, data: bytes) -> bool:
        target = self._root / name
        temporary = self._temporary(target)
        try:
            self._fill(temporary, (data,))
            os.link(temporary, target)  # unlike a rename, fails when the target exists
        except FileExistsError:
            return False
        except OSError as error:
            raise write_error(self, name, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        fsync_directory(target.parent)
        return True

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._root / name).unlink()

    def make(self, folder: str) -> None:
        try:
            (self._root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self, folder, error) from error

    def lock(self, name: str) -> Lock:
        try:
            return FileLock(self._root / name).acquire()
        except OSError as error:
            raise write_error(self, name, error) from error

    def locked_by(self, name: str) -> str | None:
        path = self._root / name
        if not path.exists():
            return None
        probe = FileLock(path)
        try:
            holder = path.read_text(errors="replace").strip()
            probe.acquire()
        except TraceLockedError:
            return f"process {holder or 'unknown'}"
        except OSError:
            return None
        probe.release()
        return None

    def free(self) -> int | None:
        existing = next((one for one in (self._root, *self._root.absolute().parents) if one.exists()), Path.cwd())
        return shutil.disk_usage(existing).free

    def _temporary(self, target: Path) -> Path:
        return target.with_name(f".{target.name}.{os.getpid()}.tmp")

    @staticmethod
    def _fill(path: Path, chunks: Iterable[Chunk]) -> int:
        with path.open("wb", buffering=1 << 20) as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
            return stream.tell()


class RemoteStore:
    """An fsspec filesystem; a lock is an object that names its holder."""

    local = False

    def __init__(self, url: str) -> None:
        import fsspec

        self.root = url.rstrip("/")
        try:
            self._fs, self._base = fsspec.core.url_to_fs(self.root)
        except (ValueError, ImportError) as error:
            raise InputError(f"{url}: {error}") from error

    def names(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return [str(one).rstrip("/").rpartition("/")[2] for one in self._fs.ls(self._path(folder), detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int | None:
        self._fs.invalidate_cache()
        try:
            found = self._fs.info(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if found["type"] == "directory" else int(found["size"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        return bytes(self._fs.cat_file(self._path(name), start=start, end=stop))

    def map(self, name: str) -> mmap.mmap | None:
        return None

    def put(self, name: str, chunks: Iterable[Chunk]) -> int:
        size = 0
        try:
            with self._fs.open(self._path(name), "wb") as stream:
                for chunk in chunks:
                    size += stream.write(bytes(chunk))
        except OSError as error:
            raise write_error(self, name, error) from error
        return size

    def put_new(self, name: str, data: bytes) -> bool:
        if self.size(name) is not None:
            return False
        self.put(name, (data,))
        return True

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def make(self, folder: str) -> None:
        self._fs.makedirs(self._path(folder), exist_ok=True)

    def lock(self, name: str) -> Lock:
        holder = self.locked_by(name)
        if holder is not None:
            raise TraceLockedError(
                f"{self.root}/{name}: {holder} writes here; wait for it, or delete that object if it is gone"
            )
        self.put(name, (json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(),))
        return _RemoteLock(self, name)

    def locked_by(self, name: str) -> str | None:
        if self.size(name) is None:
            return None
        holder = json.loads(self.read(name))
        if holder["host"] == socket.gethostname() and not _alive(holder["pid"]):
            return None
        return f"process {holder['pid']} on {holder['host']}"

    def free(self) -> int | None:
        return None

    def _path(self, name: str) -> str:
        return self._base if name == "." else f"{self._base}/{name}"


class _RemoteLock:
    def __init__(self, store: RemoteStore, name: str) -> None:
        self._store, self._name = store, name

    def release(self) -> None:
        self._store.delete(self._name)


def write_error(store: Store, name: str, error: OSError) -> TraceError:
    """Return the one-line error for a write that the system refused."""
    reason = error.strerror or str(error)
    advice = "check the path"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"{store.free()} bytes are free; free some, or resume elsewhere with a smaller level or max_bytes"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "give a directory that this user may write to"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        advice = "a file stands where a directory is needed"
    place = store.root if name == "." else f"{store.root}/{name}"
    return TraceWriteError(f"cannot write {place}: {reason}; {advice}; what was committed before stays readable")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
