"""The steerings of a server: the files of one directory, read whole at the start and held in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimtab._base.files import atomic_write_bytes, fsync_directory
from trimtab.backends.vllm.server.naming import MIN_DIGEST, PARAM, Term, check_name
from trimtab.backends.vllm.server.refusal import Refusal
from trimtab.errors import InputError, SteeringError
from trimtab.steering import Add, Steering

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Stored:
    """One steering with its name."""

    name: str
    steering: Steering
    digest: str
    nbytes: int

    def document(self) -> dict[str, object]:
        """Return what a client is told of it."""
        return {
            "id": self.name,
            "object": "steering",
            "digest": self.digest,
            "bytes": self.nbytes,
            "sites": list(self.steering.sites),
            "ops": self.steering.describe(),
            "takes_strength": all(isinstance(one.op, Add) for one in self.steering.bound),
        }


class Store:
    """Steerings by name.

    Args:
        directory: holds one `name.safetensors` per steering; other files are left alone.

    Raises:
        InputError: no such directory, or a file in it whose name or content cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise InputError(
                f"--steering {directory}: no such directory; give one with steering files, or an empty one"
            )
        self.directory = directory
        self._held: dict[str, Stored] = {}
        for path in sorted(directory.glob(f"*{SUFFIX}")):
            if path.name.startswith("."):
                continue  # a draft that a killed writer left
            try:
                name = check_name(path.name.removesuffix(SUFFIX))
                steering = Steering.load(path)
            except (Refusal, SteeringError) as error:
                raise InputError(f"{path}: {error}; mend it, or move it out of the directory") from error
            self._held[name] = Stored(name, steering, steering.digest, path.stat().st_size)

    def __len__(self) -> int:
        return len(self._held)

    def listed(self) -> list[Stored]:
        """Return all, in the order of their names."""
        return [self._held[name] for name in sorted(self._held)]

    def get(self, name: str) -> Stored:
        """Return one by its name.

        Raises:
            Refusal: 404, no such steering.
        """
        found = self._held.get(check_name(name))
        if found is None:
            raise Refusal(f"there is no steering {name!r}; {self._existing()}", reason="unknown_name", status=404)
        return found

    def find(self, term: Term) -> Stored:
        """Return the one that a request names.

        Raises:
            Refusal: 400, no such steering, or a digest that several have.
        """
        if not term.by_digest:
            found = self._held.get(term.key)
            if found is None:
                raise Refusal(
                    f"there is no steering {term.key!r}; {self._existing()}", reason="unknown_name", param=PARAM
                )
            return found
        matches = [one for one in self.listed() if one.digest.startswith(term.key)]
        if len({one.digest for one in matches}) != 1:
            what = "no steering has" if not matches else "several steerings have"
            raise Refusal(
                f"{what} a digest that begins with {term.key}; give {MIN_DIGEST} to 64 digits of one that GET "
                "/v1/steerings lists",
                reason="unknown_name",
                param=PARAM,
            )
        return matches[0]

    def put(self, name: str, steering: Steering) -> Stored:
        """Write a steering to the directory, whole or not at all, and hold it."""
        data = steering.dumps()
        atomic_write_bytes(self._path(name), data)
        stored = Stored(name, steering, steering.digest, len(data))
        self._held = {**self._held, name: stored}  # a new dict: another thread may be reading the old one
        return stored

    def remove(self, name: str) -> Stored:
        """Remove a steering and its file.

        Raises:
            Refusal: 404, no such steering.
        """
        stored = self.get(name)
        self._path(name).unlink(missing_ok=True)
        fsync_directory(self.directory)
        self._held = {key: one for key, one in self._held.items() if key != name}
        return stored

    def _path(self, name: str) -> Path:
        return self.directory / f"{check_name(name)}{SUFFIX}"

    def _existing(self) -> str:
        if not self._held:
            return "this server has none yet"
        names = sorted(self._held)
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        return f"this server has {', '.join(names[:20])}{more}"


def read_upload(data: bytes, name: str) -> Steering:
    """Read an uploaded steering file. Nothing is unpickled: the format is safetensors with JSON.

    Raises:
        Refusal: bytes that are no steering file.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    if not (data[8:9] == b"{" and end <= len(data)):  # length of the header, then JSON
        raise Refusal(
            f"the upload {name!r} of {len(data)} bytes is not a steering file: it does not begin with the header of a "
            "safetensors file; send what Steering.save wrote",
            reason="bad_file",
        )
    try:
        return Steering.loads(data, name=f"the upload {name!r}")
    except InputError as error:
        raise Refusal(str(error), reason="bad_file") from error
    except (RecursionError, OverflowError, UnicodeError, AttributeError, TypeError, ValueError) as error:
        raise Refusal(
            f"the upload {name!r} is not a steering file: {type(error).__name__}; send what Steering.save wrote",
            reason="bad_file",
        ) from error
